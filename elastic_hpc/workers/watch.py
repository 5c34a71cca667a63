"""Whether the workers of one node make progress: their reports and output, and whether a signal has stopped them. Only
time in which the agent itself could run counts: Slurm suspends agents and workers alike (``scontrol suspend``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from elastic_hpc.membership.hangs import NO_SIGNS, Signs
from elastic_hpc.membership.slow import NO_PACE, Pace, usual
from elastic_hpc.training.progress import LOCAL_DIR, PROGRESS_FILE, Progress, read_progress, read_times
from elastic_hpc.workers.proc import is_stopped
from elastic_hpc.workers.work import Doing, Work

_PAUSE = 5.0
"""Most seconds that count between two looks: during a longer pause the agent was stopped, and its workers too."""

_QUIET = 30.0
"""Seconds without a sign of life after which the watch looks at what the workers do."""

_WORK_EVERY = 5.0
"""Seconds between two looks at what the workers do."""

_PACE_EVERY = 0.5
"""Seconds between two looks at the times of their steps."""

_BLOCKED_AT_MOST = 3600.0
"""Seconds for which workers may wait for a device before that time counts too: a file server that does not answer may
recover, a GPU usually does not.
"""


@dataclass(frozen=True)
class Trouble:
    """Why the workers make no progress. ``pid``: the stopped worker, or the first worker."""

    kind: str
    message: str
    pid: int


class Watch:
    """The workers of one node, round after round."""

    def __init__(self, hang_timeout: timedelta | None, stop_timeout: float, written: Callable[[], int] = int) -> None:
        """A worker that is stopped (SIGSTOP) for ``stop_timeout`` seconds is in trouble. ``written`` returns how
        many bytes of output the workers of the round have written (``NodeLogs.written``).
        """
        self._written = written
        self._hang_timeout = hang_timeout.total_seconds() if hang_timeout else None
        self._now = 0.0
        """Seconds in which this agent could run."""
        self._stop_timeout = stop_timeout
        self.stop()

    def start(self, pids: Sequence[int]) -> None:
        """A round has started."""
        self.stop()
        self._pids += pids
        self._work = Work(self._pids)

    def stop(self) -> None:
        self.progress = Progress(-1, drained=False)
        """Progress of all workers together: the highest step, whether any worker listens or was drained, and a loss."""
        self._signs = NO_SIGNS
        self.pace = NO_PACE
        self._paced_at = self._now
        self.stacks_recorded = False
        self._pids: list[int] = []
        self._output_size = -1
        self._stopped: dict[int, float] = {}
        self._reports: list[tuple[int, float]] = []
        """Last step of each worker that has reported steps, and when it was reported."""
        self._looked_at = time.monotonic()
        self._began = self._first_sign = self._last_sign = self._last_report = self._last_progress = self._now
        self._work, self._worked_at = Work(()), self._now
        self._doing: Doing = "idle"
        self._blocked = 0.0
        """Seconds since the last sign of life in which the workers waited for a device."""

    def look(self) -> None:
        """Read what the workers have reported and written."""
        passed = min(time.monotonic() - self._looked_at, _PAUSE)
        self._looked_at = time.monotonic()
        self._now = now = self._now + passed
        files = [
            Path(os.environ[LOCAL_DIR], PROGRESS_FILE.format(local_rank=local)) for local in range(len(self._pids))
        ]
        reports = [read_progress(file) for file in files]
        if now - self._paced_at >= _PACE_EVERY:
            self._paced_at, times = now, [read_times(file) for file in files]
            measured = min((count for count, _ in times), default=0)
            slowest = max(usual(each) for _, each in times) if measured else 0.0
            self.pace = Pace(measured, round(slowest, 6)) if measured else NO_PACE
        reported = [progress for progress in reports if progress]
        furthest = max(reported, key=lambda progress: progress.step, default=Progress(-1, drained=False))
        latest = furthest._replace(
            drained=any(progress.drained for progress in reported),
            listens=any(progress.listens for progress in reported),
            loss=next((progress.loss for progress in reported if progress.loss is not None), None),
        )
        output_size = self._written()
        steps = [(progress.step, progress.step_at) for progress in reported if progress.step >= 0]
        self._count(passed, reported=steps != self._reports, written=output_size > max(0, self._output_size))
        self._reports = steps
        if latest.step != self.progress.step or (latest.step < 0 and output_size != self._output_size):
            self._last_progress = now
        self.progress, self._output_size = latest, output_size
        stopped = {pid for pid in self._pids if is_stopped(pid)}
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped}

    def _count(self, passed: float, *, reported: bool, written: bool) -> None:
        """``passed`` seconds have passed since the last look, in which the workers have ``reported`` or ``written``."""
        before, now = self._signs, self._now
        if not self._pids:
            return
        if now - self._last_sign > _QUIET and now - self._worked_at >= _WORK_EVERY:
            self._doing, self._worked_at = self._work.look(now - self._worked_at), now
        blocked = self._doing == "blocked" and self._blocked < _BLOCKED_AT_MOST
        if blocked:
            self._blocked += passed
            self._last_sign += passed
            self._last_report += passed
        idle = before.idle + passed * (self._doing != "busy" and not blocked)
        span, start = before.span, before.start
        if reported or written:
            self._first_sign = now if span < 0 else self._first_sign
            self._last_sign, idle, span = now, 0.0, now - self._first_sign
            self._work, self._worked_at, self._doing, self._blocked = Work(self._pids), now, "idle", 0.0
        if reported:
            start = start or now - self._began
            self._last_report = now
        silent, unreported = now - self._last_sign, now - self._last_report
        self._signs = Signs(silent, idle, unreported, before.reports + reported, span, start)

    @property
    def signs(self) -> Signs:
        """The signs of all workers together, for the leader."""
        silent, idle, unreported, reports, span, start = self._signs
        return Signs(round(silent, 1), round(idle, 1), round(unreported, 1), reports, round(span, 1), round(start, 1))

    def trouble(self) -> Trouble | None:
        """Why the workers make no progress, if they make none."""
        now = self._now
        for pid, stopped_at in self._stopped.items():
            if now - stopped_at > self._stop_timeout:
                return Trouble("stopped", f"stopped by a signal for {self._stop_timeout:g} s (SIGSTOP)", pid)
        if self._hang_timeout and self._pids and now - self._last_progress > self._hang_timeout:
            step = self.progress.step
            what = f"no progress after step {step}" if step >= 0 else "no output"
            return Trouble("hang", f"{what} for {self._hang_timeout:g} s (--hang-timeout)", self._pids[0])
        return None
