"""Starts the workers of a node that has no place in the running round, up to the call of ``live`` in their script. The
world changes for the node only when they are ready, so that no other worker waits for their start. Such a node is a
spare, a joiner, or has lost a live worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Sequence

from elastic_hpc.workers import guard
from elastic_hpc.workers.aside import OF_A_ROUND
from elastic_hpc.workers.lives import Lives
from elastic_hpc.workers.proc import exit_code
from elastic_hpc.workers.standbys import Standbys

log = logging.getLogger(__name__)

_PATIENCE = 120.0
"""Seconds in which workers that are started ahead must be ready. After that, the world changes without them, and they
start like other workers.
"""

_KILL_TIMEOUT = 2.0


class _Worker:
    """A worker that is not ready yet."""

    def __init__(self, local_rank: int, process: subprocess.Popen[bytes], outputs: tuple[int, int]) -> None:
        self.local_rank, self.process, self.outputs = local_rank, process, outputs
        self.pidfd = os.pidfd_open(process.pid)

    def ended(self) -> str:
        """How the worker has ended, with the last line of its stderr; empty if it has not."""
        if (code := exit_code(self.pidfd)) is None:
            return ""
        size = os.fstat(self.outputs[1]).st_size
        lines = os.pread(self.outputs[1], 1 << 16, max(0, size - (1 << 16))).decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return f"local rank {self.local_rank} has ended with exit code {code}: {last}"

    def kill(self) -> None:
        guard.kill_sessions([self.process.pid])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_TIMEOUT)
        for descriptor in (self.pidfd, *self.outputs):
            os.close(descriptor)


class Ahead:
    """The workers of one node, ahead of their first round."""

    def __init__(self, lives: Lives, standbys: Standbys, command: Sequence[str], count: int) -> None:
        """``command`` starts a worker, ``count``: number of workers."""
        self._lives, self._standbys, self._command, self._count = lives, standbys, tuple(command), count
        self._starting: list[_Worker] = []
        self._began = 0.0
        self._in_vain = False
        """The script cannot be started ahead."""

    @property
    def lacking(self) -> bool:
        """Whether this node had live workers, and must restart some of them."""
        return self._lives.were_live and not self._in_vain and len(self._lives.waiting) < self._count

    @property
    def waiting(self) -> bool:
        """Whether workers of this node have paused and hold the trained state."""
        return bool(self._lives.waiting)

    def look(self, *, wanted: bool) -> bool:
        """Start the missing workers if ``wanted``. Returns whether any have yet to be started, or are starting."""
        if self._in_vain:
            return False
        if not self._starting:
            if not wanted or len(self._lives.waiting) == self._count:
                return self.lacking
            self._start()
        self._lives.look()
        for worker in list(self._starting):
            if self._lives.keep_ready(worker.local_rank, worker.process, worker.outputs):
                self._starting.remove(worker)
                os.close(worker.pidfd)
        why = next(filter(None, (worker.ended() for worker in self._starting)), "")
        if self._starting and time.monotonic() - self._began > _PATIENCE:
            why = why or f"they have not called live() within {_PATIENCE:g} s"
        if why:
            log.info("the workers of this node are not started ahead: %s", why)
            self._in_vain = True
            self.end()
        return bool(self._starting)

    def end(self) -> None:
        """Kill the workers that are not ready."""
        for worker in self._starting:
            self._lives.expect(worker.process.pid, None)
            worker.kill()
        self._starting = []

    def _start(self) -> None:
        """No rank is known yet: a script that needs one before it calls ``live`` fails, and is started later."""
        self._began = time.monotonic()
        log.info("starting the workers of this node, so that they are ready when it gets a place")
        inherited = {name: value for name, value in os.environ.items() if name not in OF_A_ROUND}
        for local_rank in self._lives.missing(self._count):
            environ = {**inherited, "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(self._count)}
            outputs = os.memfd_create("stdout"), os.memfd_create("stderr")
            process = self._standbys.take(self._command, environ, outputs) or subprocess.Popen(
                self._command, env=environ, stdout=outputs[0], stderr=outputs[1], start_new_session=True
            )
            worker = _Worker(local_rank, process, outputs)
            self._starting.append(worker)
            self._lives.expect(process.pid, worker.pidfd)
