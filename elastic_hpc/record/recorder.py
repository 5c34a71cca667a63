"""Writes the leader's record on a thread of its own: a full, read-only or stalled file system never stops training."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.events import sentence
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.strikes import Strike, dump, live, load
from elastic_hpc.record.rundir import RunDir

log = logging.getLogger(__name__)


class Recorder:
    """Events, state and verdict of one job, written by the leader on ``host``. No method but ``close`` blocks.

    The first write that fails is logged. Events and state that could not be written are written as soon as the file
    system accepts them again.
    """

    def __init__(self, rundir: RunDir, run: int, host: Host) -> None:
        self._rundir = rundir
        self._run = run
        self._host = host
        # only the thread uses the next three
        self._strikes: tuple[Strike, ...] = ()
        self._unwritten: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=1000)
        self._unwritten_state: dict[str, Any] | None = None
        self._last_beat = 0.0
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._complained = False
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()
        self._put(self._load_strikes)

    def publish(self) -> None:
        """Publish in ``endpoint.json`` where the leader listens."""
        leader = {"run": self._run, "node": self._host.node, "host": self._host.name}
        endpoint = {**leader, "addresses": self._host.addresses, "port": self._host.port}
        self._put(lambda: self._rundir.write("endpoint.json", endpoint))

    def beat(self) -> None:
        """Set the time of ``endpoint.json``, which shows that a leader is at work, and needs no space on the disk."""
        if time.monotonic() - self._last_beat > 1.0:
            self._last_beat = time.monotonic()
            self._put(self._beat)

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Append an event; the agent's log shows most of them too."""
        when = time.time()
        if name in {"lost", "unfit"}:
            self._put(lambda: self._add_strike(Strike(fields["node"], when, fields["reason"])))
        if name not in {"progress", "allocation", "started"}:
            log.info("%s", sentence(name, fields))

        def write() -> None:
            self._unwritten.append((when, name, fields))
            self._catch_up()

        self._put(write)

    def state(self, **state: int) -> None:
        """Replace ``state.json``."""

        def write() -> None:
            self._unwritten_state = {**state, "run": self._run, "strikes": dump(self._strikes)}
            self._catch_up()

        self._put(write)

    def verdict(self, verdict: dict[str, Any]) -> Future[None]:
        """Replace ``verdict.json``; the future is done when the file is on disk, or has the OSError."""
        return self._put(lambda: self._rundir.write("verdict.json", {**verdict, "run": self._run, "time": time.time()}))

    def close(self, timeout: float = 5.0) -> None:
        """Wait, at most ``timeout`` seconds, until the thread has written what is queued."""
        self._put(self._catch_up)
        self._queue.put(None)
        self._thread.join(timeout)

    def _put(self, write: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._queue.put((write, done))
        return done

    def _load_strikes(self) -> None:
        """The strikes of nodes that failed before this recorder was made."""
        try:
            earlier = load((self._rundir.read("state.json") or {}).get("strikes", ()))
        except ElasticError as error:
            raise OSError(str(error)) from error
        self._strikes = live((*earlier, *self._strikes), time.time())

    def _beat(self) -> None:
        os.utime(self._rundir.path / "endpoint.json")
        self._catch_up()

    def _catch_up(self) -> None:
        while self._unwritten:
            self._rundir.append_event(*self._unwritten[0])
            self._unwritten.popleft()
        if self._unwritten_state is not None:
            self._rundir.write("state.json", self._unwritten_state)
            self._unwritten_state = None

    def _add_strike(self, strike: Strike) -> None:
        self._strikes = (*self._strikes, strike)

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            write, done = item
            try:
                write()
            except OSError as error:
                if not self._complained:
                    log.warning("the run directory cannot be written (%s); training goes on without its record", error)
                self._complained = True
                done.set_exception(error)
            else:
                done.set_result(None)
