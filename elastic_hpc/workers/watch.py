"""Whether one node's workers get on: what they report, what they write, whether they were stopped. Reads files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from elastic_hpc.training.progress import LOCAL_DIR, PROGRESS_FILE, Progress, read_progress
from elastic_hpc.workers.proc import is_stopped


@dataclass(frozen=True)
class Trouble:
    """Workers that stand still; ``pid`` is one of them."""

    kind: str
    message: str
    pid: int


class Watch:
    """The workers of one node, round after round."""

    def __init__(self, hang_timeout: timedelta | None, stop_timeout: float) -> None:
        """A worker that is stopped (SIGSTOP) for ``stop_timeout`` seconds is in trouble."""
        self._pids: list[int] = []
        self._outputs: list[str] = []
        self._hang_timeout = hang_timeout.total_seconds() if hang_timeout else None
        self._stop_timeout = stop_timeout
        self.stop()

    def start(self, pids: Sequence[int], outputs: Sequence[str]) -> None:
        """A round has started. ``outputs`` are the files that the workers write to."""
        self.stop()
        self._pids, self._outputs = list(pids), list(outputs)
        self._moved = time.monotonic()

    def stop(self) -> None:
        self.progress = Progress(-1, drained=False)
        """Of all workers: the last step of the one that is furthest, what any has said of drains, the first loss."""
        self.stacks_recorded = False
        self._pids, self._outputs = [], []
        self._moved = 0.0
        self._written = -1
        self._stopped: dict[int, float] = {}

    def look(self) -> None:
        """See what has changed."""
        now = time.monotonic()
        found = [
            read_progress(Path(os.environ[LOCAL_DIR], PROGRESS_FILE.format(local_rank=local)))
            for local in range(len(self._pids))
        ]
        told = [progress for progress in found if progress]
        furthest = max(told, key=lambda progress: progress.step, default=Progress(-1, drained=False))
        seen = furthest._replace(
            drained=any(progress.drained for progress in told),
            listens=any(progress.listens for progress in told),
            loss=next((progress.loss for progress in told if progress.loss is not None), None),
        )
        written = sum(map(_size, self._outputs))
        if seen.step != self.progress.step or (seen.step < 0 and written != self._written):
            self._moved = now
        self.progress, self._written = seen, written
        stopped = {pid for pid in self._pids if is_stopped(pid)}
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}

    def trouble(self) -> Trouble | None:
        """What is wrong with them, if anything."""
        now = time.monotonic()
        for pid, since in self._stopped.items():
            if now - since > self._stop_timeout:
                return Trouble("stopped", f"stopped by a signal for {self._stop_timeout:g} s (SIGSTOP)", pid)
        if self._hang_timeout and self._pids and now - self._moved > self._hang_timeout:
            step = self.progress.step
            what = f"no progress after step {step}" if step >= 0 else "no output"
            return Trouble("hang", f"{what} for {self._hang_timeout:g} s (--hang-timeout)", self._pids[0])
        return None


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.path.getsize(path)
    return 0
