"""The live workers of a node: their processes can be kept for the next round, in place.

A script that uses ``training.live`` connects to the agent. When the round ends, the agent has the worker pause instead
of killing it. A worker that has paused does nothing until the next round, for which it gets the variables and the
output files of its new rank, as a standby does. Each message on the connection is a JSON object.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from elastic_hpc.training.progress import why_not_in_place
from elastic_hpc.workers import guard
from elastic_hpc.workers.live_worker import ENDED, MALFORMED, KeptWorker, LiveWorker

log = logging.getLogger(__name__)

_KILL_TIMEOUT = 2.0
"""Seconds to wait for the death of kept workers that are not needed."""

_MOST = 300
"""Most characters, in the record, of the reason why a worker was not kept."""

_PEER = struct.Struct("3i")  # pid, uid, gid


class Lives:
    """The live workers of one node, round after round. Only ``discard`` waits."""

    def __init__(self, path: str) -> None:
        """``path``: of the socket to which workers connect; the folder is closed to other users. Without this path, or
        if the socket cannot be made, no worker is kept.
        """
        self._listener: socket.socket | None = None
        self._workers: dict[int, int] = {}
        """The pidfds of the processes that may connect, by pid."""
        self._lives: dict[int, LiveWorker] = {}
        """The connected workers of the round, by pid."""
        self._kept: dict[int, KeptWorker] = {}
        """The kept workers by local rank, between two rounds."""
        self._taken: list[LiveWorker] = []
        """The workers that continue, while a round begins."""
        self.kept = self.ahead = 0
        """Number of workers of the round that kept their process from the previous round, or were started ahead."""
        self.not_kept = ""
        """Why a living worker of the previous round could not be kept; empty if all were kept."""
        self._not_kept = ""
        """The same for the round that ends."""
        self.were_live = False
        """Whether a worker of the round, or of the last one, has connected."""
        if path:
            self._listen(path)

    def _listen(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(path)
            listener.listen(64)
        except OSError as error:
            log.warning("workers cannot be kept for the next round: %s: %s", path, error)
            listener.close()
        else:
            self._listener = listener

    def fds(self) -> Iterator[int]:
        """The descriptors that become readable when there is something to ``look`` at."""
        if self._listener:
            yield self._listener.fileno()
        yield from (live.fileno() for live in self._lives.values())

    def begin(self, pidfds: Mapping[int, int]) -> None:
        """The workers of a round have been started, or continue: their pidfds, by pid."""
        self.discard("the round has no place for it")
        for pid in list(self._lives):
            self._leave(pid)
        self._workers = dict(pidfds)
        self._lives = {live.pid: live for live in self._taken}
        for live in self._taken:
            live.pidfd = pidfds[live.pid]
        self.ahead = sum(live.is_new for live in self._taken)
        self.were_live = bool(self._taken)
        self.kept, self._taken = len(self._taken) - self.ahead, []
        self.not_kept, self._not_kept = self._not_kept, ""

    def look(self) -> None:
        """Accept new connections, and read what workers have sent."""
        while self._listener:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # usually because no connection is waiting
                break
            pid, *_ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if pid in self._workers:
                self._leave(pid)
                self._lives[pid] = LiveWorker(pid, self._workers[pid], connection)
                self.were_live = True
            else:
                log.info("process %d is not kept for the next round: it is no worker, but started by one", pid)
                connection.close()
        for pid, live in list(self._lives.items()):
            try:
                goes_on = live.read()
            except (OSError, *MALFORMED) as error:
                goes_on = False
                log.info("worker %d is not kept for the next round: %s", pid, error)
            if not goes_on:
                self._leave(pid)

    # before this node has a place

    def missing(self, count: int) -> list[int]:
        """The local ranks, of ``count``, for which no worker waits."""
        return [local_rank for local_rank in range(count) if local_rank not in self._kept]

    def expect(self, pid: int, pidfd: int | None) -> None:
        """The worker ``pid`` was started ahead of its first round, and may connect; with None it will be killed."""
        self._leave(pid)
        self._workers.pop(pid, None)
        if pidfd is not None:
            self._workers[pid] = pidfd

    def keep_ready(self, local_rank: int, process: subprocess.Popen[bytes], written: Sequence[int]) -> bool:
        """Keep ``process`` for its first round if it is ready. Returns whether it is ready."""
        live = self._lives.get(process.pid)
        if live is None or not live.paused:
            return False
        self._kept[local_rank] = KeptWorker(process, self._lives.pop(process.pid), written)
        return True

    def _leave(self, pid: int) -> None:
        if live := self._lives.pop(pid, None):
            live.close()

    # while a round runs

    @property
    def connected(self) -> frozenset[int]:
        """Pids of the workers of the round that can be kept, as far as is known."""
        return frozenset(self._lives)

    @property
    def paused(self) -> frozenset[int]:
        """Pids of the workers of the round that have paused."""
        return frozenset(pid for pid, live in self._lives.items() if live.paused)

    def broken(self) -> tuple[int, str] | None:
        """A worker that is blocked or gives up without a request, and why: pid and text."""
        now = time.monotonic()
        for pid, live in self._lives.items():
            if live.hopeless:
                return pid, live.hopeless
            if now >= live.tells_at:
                return pid, live.broken
        return None

    def pause(self, *, now: bool) -> None:
        """Ask all workers to pause: ``now``, as their round is over, or at the end of their step."""
        for pid, live in list(self._lives.items()):
            try:
                live.pause(now=now)
            except OSError:
                self._leave(pid)

    @property
    def are_pausing(self) -> bool:
        """Whether a worker was asked to pause and may still pause."""
        return any(live.is_pausing for live in self._lives.values())

    @property
    def due(self) -> float:
        """When there is something to decide even if nothing arrives, on the monotonic clock."""
        times = [live.due if live.is_pausing else live.tells_at for live in self._lives.values()]
        return min(times, default=float("inf"))

    # between two rounds

    def keep(self, handlers: MutableMapping[int, Any], folder: str) -> None:
        """Keep the workers that have paused. Removes them from ``handlers``, torch's handlers by local rank, whose
        processes will be killed. ``folder``: where workers meet their agent.
        """
        for local_rank, handler in list(handlers.items()):
            if (live := self._lives.get(handler.proc.pid)) is None:
                told = why_not_in_place(folder, local_rank)
                self._not_kept = self._not_kept or told[:_MOST]
                continue
            why = live.obstacle()
            if live.paused and not why:
                self._kept[local_rank] = KeptWorker(handlers.pop(local_rank).proc, self._lives.pop(live.pid))
            else:  # its connection stays until it is dead: without an agent it would end with a message
                why = why or "there was no time for it to pause"
                log.info("the worker of local rank %d is not kept for the next round: %s", local_rank, why)
                self._not_kept = self._not_kept or ("" if why == ENDED else why[:_MOST])
        self._workers = {}

    @property
    def waiting(self) -> frozenset[int]:
        """Pids of the workers that wait for the next round; each leads a session."""
        return frozenset(kept.process.pid for kept in self._kept.values())

    def take(
        self, local_rank: int, environ: Mapping[str, str], outputs: Sequence[int]
    ) -> subprocess.Popen[bytes] | None:
        """The kept worker of ``local_rank``, which continues in the world that ``environ`` describes; None if there is
        none. ``outputs``: its stdout and stderr.
        """
        kept = self._kept.pop(local_rank, None)
        if kept is None:
            return None
        why = kept.obstacle()
        if not why:
            try:
                kept.go(environ, outputs)
            except OSError as error:
                why = str(error)
            else:
                self._taken.append(kept.live)
                return kept.process
        self._not_kept = self._not_kept or why[:_MOST]
        self._kill({local_rank: kept}, why)
        return None

    def discard(self, why: str) -> None:
        """Kill the workers that wait for the next round."""
        kept, self._kept = self._kept, {}
        if kept:
            self._kill(kept, why)

    @staticmethod
    def _kill(kept: Mapping[int, KeptWorker], why: str) -> None:
        for local_rank in kept:
            log.info("the worker of local rank %d is not kept: %s", local_rank, why)
        guard.kill_sessions([worker.process.pid for worker in kept.values()])
        deadline = time.monotonic() + _KILL_TIMEOUT
        for worker in kept.values():
            worker.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
