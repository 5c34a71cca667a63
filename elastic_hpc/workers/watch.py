"""Whether the workers of one node make progress: what they report and write, and whether a signal has stopped them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from elastic_hpc.training.progress import LOCAL_DIR, PROGRESS_FILE, Progress, read_progress
from elastic_hpc.workers.proc import is_stopped


@dataclass(frozen=True)
class Trouble:
    """Why the workers stand still. ``pid``: the worker that is stopped, or the first worker."""

    kind: str
    message: str
    pid: int


class Watch:
    """The workers of one node, round after round."""

    def __init__(self, hang_timeout: timedelta | None, stop_timeout: float, written: Callable[[], int] = int) -> None:
        """A worker that is stopped (SIGSTOP) for ``stop_timeout`` seconds is in trouble. ``written`` returns how
        many bytes of output the workers of the round have written (``NodeLogs.written``).
        """
        self._pids: list[int] = []
        self._written = written
        self._hang_timeout = hang_timeout.total_seconds() if hang_timeout else None
        self._stop_timeout = stop_timeout
        self.stop()

    def start(self, pids: Sequence[int]) -> None:
        """A round has started."""
        self.stop()
        self._pids = list(pids)
        self._last_progress = time.monotonic()

    def stop(self) -> None:
        self.progress = Progress(-1, drained=False)
        """Of all workers together: the highest step, whether any worker listens or was drained, and a loss."""
        self.stacks_recorded = False
        self._pids = []
        self._last_progress = 0.0
        self._output_size = -1
        self._stopped: dict[int, float] = {}

    def look(self) -> None:
        """Read what the workers have reported and written."""
        now = time.monotonic()
        reports = [
            read_progress(Path(os.environ[LOCAL_DIR], PROGRESS_FILE.format(local_rank=local)))
            for local in range(len(self._pids))
        ]
        reported = [progress for progress in reports if progress]
        furthest = max(reported, key=lambda progress: progress.step, default=Progress(-1, drained=False))
        latest = furthest._replace(
            drained=any(progress.drained for progress in reported),
            listens=any(progress.listens for progress in reported),
            loss=next((progress.loss for progress in reported if progress.loss is not None), None),
        )
        output_size = self._written()
        if latest.step != self.progress.step or (latest.step < 0 and output_size != self._output_size):
            self._last_progress = now
        self.progress, self._output_size = latest, output_size
        stopped = {pid for pid in self._pids if is_stopped(pid)}
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}

    def trouble(self) -> Trouble | None:
        """Why the workers stand still, if they do."""
        now = time.monotonic()
        for pid, stopped_at in self._stopped.items():
            if now - stopped_at > self._stop_timeout:
                return Trouble("stopped", f"stopped by a signal for {self._stop_timeout:g} s (SIGSTOP)", pid)
        if self._hang_timeout and self._pids and now - self._last_progress > self._hang_timeout:
            step = self.progress.step
            what = f"no progress after step {step}" if step >= 0 else "no output"
            return Trouble("hang", f"{what} for {self._hang_timeout:g} s (--hang-timeout)", self._pids[0])
        return None
