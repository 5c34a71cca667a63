"""One more run of a job that is over: its batch script finds the file ``over``, with an exit code, and ends at once.

Slurm starts such a run by itself after some preemptions. Agents ask for one if the batch script is lost with its node.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from datetime import timedelta

from elastic_hpc import slurm
from elastic_hpc.errors import SlurmError
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import job_name, restart_count

REQUEUE_DELAY = timedelta(seconds=8)
"""Start time asked for after a requeue. It must lie beyond the job's completion, else Slurm puts it two minutes off."""

_OVER = "over"
"""A file in the run directory, with an exit code. Where it exists, a batch script that starts again ends at once."""

_EXPECTED = "once-more"
"""A file in the run directory: Slurm will requeue the job at its end (``slurm.keeps_preemption``)."""


def expect(rundir: RunDir, job: str) -> None:
    """``job`` is about to requeue itself."""
    if slurm.keeps_preemption(job):
        with contextlib.suppress(OSError):
            (rundir.path / _EXPECTED).touch()


def settle(rundir: RunDir, environ: Mapping[str, str], outcome: str) -> None:
    """The job ends with ``outcome``, also if Slurm requeues it at its end."""
    with contextlib.suppress(OSError):
        if _comes_back(rundir, job_name(environ)):
            _mark(rundir, outcome)


def complete(rundir: RunDir, environ: Mapping[str, str], outcome: str) -> None:
    """Run the job, whose processes ignore SIGTERM, once more. Raises OSError if its script could not know that."""
    _mark(rundir, outcome)
    try:
        problem = slurm.complete(job_name(environ), start_after=REQUEUE_DELAY, run=restart_count(environ))
    except SlurmError as error:
        problem = str(error)
    if problem:
        print(f"elastic_hpc: {problem}", file=sys.stderr)


def _comes_back(rundir: RunDir, job: str) -> bool:
    """Whether Slurm requeues the job at its end: it is preempted now, or was when it requeued itself."""
    try:
        (rundir.path / _EXPECTED).unlink()
    except OSError:
        return slurm.keeps_preemption(job)
    return True


def _mark(rundir: RunDir, outcome: str) -> None:
    (rundir.path / _OVER).write_text("0" if outcome == "finished" else "1")
