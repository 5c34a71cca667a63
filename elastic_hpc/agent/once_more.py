"""One more run of an ended job: its batch script finds the file ``over``, with an exit code, and ends at once.

Slurm starts such a run automatically after some preemptions. Agents request such a run if the batch script is lost with
its node.
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
"""The job's requested start after a requeue. It must be after the job's completion, else Slurm delays it by two
minutes.
"""

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
    """The job ends with ``outcome``, even if Slurm requeues it at its end."""
    with contextlib.suppress(OSError):
        if _comes_back(rundir, job_name(environ)):
            _mark(rundir, outcome)


def complete(rundir: RunDir, environ: Mapping[str, str], outcome: str) -> None:
    """Run the job, whose processes ignore SIGTERM, once more. Raises OSError if the batch script could not learn that
    the job has ended.
    """
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
