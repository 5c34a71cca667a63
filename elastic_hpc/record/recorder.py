"""Writes the leader's record on a thread of its own: a full, read-only or stalled file system never stops training."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.events import sentence
from elastic_hpc.membership.hangs import NO_RHYTHM, Rhythm
from elastic_hpc.membership.leaderless import LEADERLESS
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.strikes import NEVER_JOINED, Strike, dump, live, load
from elastic_hpc.membership.wishes import Bounds
from elastic_hpc.record.endpoint import ENDPOINT, Published
from elastic_hpc.record.events import append_event
from elastic_hpc.record.rundir import RunDir

log = logging.getLogger(__name__)

_STALL = 5.0
"""Seconds after which a write that has not returned shows that the file system does not answer."""


class Recorder:
    """The record of one job, written by the leader on ``host``. No method except ``flush`` and ``close`` blocks.

    The first write that fails is logged. A write that failed is repeated with every heartbeat until it succeeds: the
    file system may be full, or read-only, for a while.
    """

    def __init__(
        self,
        rundir: RunDir,
        run: int,
        host: Host,
        job: str = "",
        is_shown: Callable[[int, int], bool] = lambda _rank, _local_rank: False,
    ) -> None:
        """``job``: the job in the identity of its agents (``network.identity``). ``is_shown``: whether the job's output
        has that of a worker, with its tracebacks.
        """
        self.warning = ""
        """Why Slurm has warned this run, as the run directory said at the last heartbeat; empty if it has not."""
        self._rundir = rundir
        self._run = run
        self._host = host
        self._job = job
        self._is_shown = is_shown
        self._logged_traceback = ""
        # only the thread uses the next four
        self._strikes: list[Strike] = []
        self._strikes_loaded = False
        self._unwritten_events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=1000)
        self._unwritten_files: dict[str, Callable[[], dict[str, Any]]] = {}
        """Functions that return the new content of a file, by the name of the file."""
        self._published: Published | None = None
        self._last_beat = 0.0
        self._has_concluded = False
        """A majority has agreed to the verdict."""
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._complained = False
        self._writing_since: float | None = None
        """When the thread began its present write."""
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()
        self._put(self._load_strikes)

    def publish(self, agents: Iterable[Host]) -> None:
        """Write the addresses of the leader and of the other ``agents`` to ``endpoint.json``."""
        published = Published.of(self._run, self._host, agents, self._job)
        if published != self._published:
            self._published = published
            self._put(lambda: self._replace(ENDPOINT, published.body))

    def options(self, options: dict[str, Any]) -> None:
        """Replace ``spec.json``, the options of the job."""
        self._put(lambda: self._replace("spec.json", lambda: options))

    def beat(self) -> None:
        """Show that there is a leader (``RunDir.beat``), look for a warning, and withdraw a verdict that this proves
        wrong (``RunDir.withdraw``).
        """
        if time.monotonic() - self._last_beat > 1.0:
            self._last_beat = at = time.monotonic()
            self._put(lambda: self._beat(at))

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """Append an event; the agent's log shows most of them too."""
        when = time.time()
        if name == "join":
            self._put(lambda: self._forgive(fields["node"], NEVER_JOINED))
        if name == "stay":
            self._put(lambda: self._forgive(fields["node"], fields["reason"]))
        if name in {"lost", "unfit", "barred", "absent", "stays"} or (name == "leave" and fields["exclude"]):
            known = {field: fields[field] for field in ("node", "reason", "signature", "step") if field in fields}
            self._put(lambda: self._strikes.append(Strike(time=when, **known)))
        if name not in {"progress", "allocation", "started"}:
            log.info("%s", "\n".join([sentence(name, fields), *self._new_traceback(name, fields)]).rstrip())

        def write() -> None:
            self._unwritten_events.append((when, name, fields))
            self._catch_up()

        self._put(write)

    def _new_traceback(self, name: str, fields: Mapping[str, Any]) -> list[str]:
        """The traceback of a first failure, unless the job's output has it: each traceback is logged once."""
        if name != "failure" or not fields["first"] or self._is_shown(fields["rank"], fields["local_rank"]):
            return []
        before, self._logged_traceback = self._logged_traceback, fields["traceback"]
        return [] if before == self._logged_traceback else [self._logged_traceback]

    @property
    def stalls(self) -> bool:
        """Whether a write has not returned for ``_STALL`` seconds: the file system does not answer."""
        began = self._writing_since
        return began is not None and time.monotonic() - began > _STALL

    def state(self, *, bounds: Bounds | None = None, rhythm: Rhythm = NO_RHYTHM, **state: int) -> None:
        """Replace ``state.json``. ``bounds``: the bounds that replace those of the submission."""

        def body() -> dict[str, Any]:
            self._load_strikes()
            changed: dict[str, Any] = {"bounds": bounds.body} if bounds else {}
            changed |= {"rhythm": list(rhythm)} if rhythm.number else {}
            return {**state, **changed, "run": self._run, "strikes": dump(self._strikes)}

        self._put(lambda: self._replace("state.json", body))

    def verdict(self, verdict: dict[str, Any]) -> Future[None]:
        """Replace ``verdict.json``; the future is done when the file is on disk, or has the OSError of the first
        attempt.
        """
        self._has_concluded = verdict.get("actor") != LEADERLESS
        body = {**verdict, "run": self._run, "time": time.time()}
        return self._put(lambda: self._replace("verdict.json", lambda: body))

    def flush(self, timeout: float = 5.0) -> None:
        """Wait, at most ``timeout`` seconds, until the thread has written what is queued."""
        wait([self._put(self._catch_up)], timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Write what is queued, as ``flush``, and end the thread."""
        self._put(self._catch_up)
        self._queue.put(None)
        self._thread.join(timeout)

    def _put(self, write: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._queue.put((write, done))
        return done

    def _load_strikes(self) -> None:
        """Add the strikes that the record already has. Does nothing once that has succeeded. Raises OSError."""
        if self._strikes_loaded:
            return
        try:
            state = self._rundir.read("state.json") or {}
        except ElasticError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            state = {}  # damaged, and will not be read later either
        if not state and not self._rundir.path.is_dir():
            raise FileNotFoundError(self._rundir.path)  # the file system is missing, the file's content is not lost
        self._strikes_loaded = True
        self._strikes = list(live((*load(state.get("strikes", ())), *self._strikes), time.time()))

    def _forgive(self, node: str, reason: str) -> None:
        """An agent has connected from ``node``, late or because the node works again; or the node no longer has to
        leave.
        """
        self._strikes = [strike for strike in self._strikes if (strike.node, strike.reason) != (node, reason)]

    def _beat(self, at: float) -> None:
        """``at``: when this leader had its majority. After a stall of the file system, that proves nothing."""
        with contextlib.suppress(ElasticError):
            self.warning = self.warning or self._rundir.warning(self._run)
        if not self._has_concluded and time.monotonic() - at < _STALL:
            with contextlib.suppress(ElasticError, OSError):
                if withdrawn := self._rundir.withdraw(self._run):
                    self.event("withdrawn", {name: str(withdrawn.get(name, "")) for name in ("node", "reason")})
        try:
            self._rundir.beat()
        finally:
            self._catch_up()

    def _replace(self, name: str, body: Callable[[], dict[str, Any]]) -> None:
        self._unwritten_files[name] = body
        self._catch_up()

    def _catch_up(self) -> None:
        """Write all that is not written yet, as far as that succeeds. Then raises the first OSError, if any."""
        problem: OSError | None = None
        try:
            while self._unwritten_events:
                append_event(self._rundir.path, self._host.name, *self._unwritten_events[0])
                self._unwritten_events.popleft()
        except OSError as error:
            problem = error
        for name, body in list(self._unwritten_files.items()):
            try:
                self._rundir.write(name, body())
                del self._unwritten_files[name]
            except OSError as error:
                problem = problem or error
        if problem:
            raise problem

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            write, done = item
            self._writing_since = time.monotonic()
            try:
                write()
            except OSError as error:
                if not self._complained:
                    log.warning("cannot write the run directory (%s); training continues without its record", error)
                self._complained = True
                done.set_exception(error)
            else:
                done.set_result(None)
            finally:
                self._writing_since = None
