"""The submission of a job: the last checks before Slurm is asked, and the files that the job needs. Writes files."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.job import outputs, snapshot
from elastic_hpc.job.script import render
from elastic_hpc.job.spec import AFTER_GRACE, NAME_OF_SCRIPT, JobSpec
from elastic_hpc.options.durations import as_text, time_limit
from elastic_hpc.options.from_python import PYTHON
from elastic_hpc.options.sbatch import COMMAND_LINE, last
from elastic_hpc.record.folders import make_log_dir

_KILL_WAIT = timedelta(seconds=25)  # the agents give the workers 20 s after SIGTERM


@contextlib.contextmanager
def prepared(job: JobSpec, *, will_run: bool = True) -> Iterator[bytes]:
    """Put in place what ``job`` needs, and yield its batch script, for the body to submit. Raises UsageError.

    If the body raises UsageError, the copy of the code is removed. ``will_run``: False if Slurm only checks the job.
    """
    job = replace(job, token=secrets.token_hex(8))
    script, staged = checked(job), Path(job.staged)
    make_log_dir(job.log_dir)
    try:
        tempfile.TemporaryFile(dir=job.log_dir).close()
    except OSError as error:
        raise UsageError(
            f"--log-dir {job.log_dir!r}: {error.strerror}; "
            "expected a folder that can be written and that all nodes share"
        ) from None
    if will_run:
        outputs.make_folders(job.sbatch, os.path.join(os.getcwd(), last(job.sbatch, "chdir") or ""))
    if job.code and will_run and job.token in script:
        snapshot.put_aside(job.code, staged, snapshot=job.snapshot)
    try:
        yield os.fsencode(script)
    except UsageError as error:  # Slurm refused the job; after other errors it may be there
        snapshot.discard(staged)
        raise UsageError(f"{error}{_from_elsewhere(job, str(error))}") from None


def _from_elsewhere(job: JobSpec, refusal: str) -> str:
    """The options that ``refusal`` names and that nobody typed for this job, with their sources."""
    words = {word.strip("-") for word in re.findall(r"[a-z-]+", refusal.lower())}
    typed = (COMMAND_LINE, PYTHON, NAME_OF_SCRIPT)
    found = [f"{g}, {g.source}" for g in job.sbatch if g.name in words and g.source not in typed]
    return f" ({'; '.join(found)})" if found else ""


def checked(job: JobSpec) -> str:
    """The batch script of ``job``. Raises UsageError also for a job that would fail later."""
    text = render(job)
    _check_time(job, text)
    if job.snapshot and os.path.basename(job.staged) not in text:
        raise UsageError(
            f"--template {job.template} with --snapshot: it does not take the copy of the code; include snapshot.j2 "
            "and workdir.j2 as the built-in template elastic.sbatch.j2 does, or leave out --snapshot"
        )
    if not job.launch.grow:
        return text
    if job.container:
        raise UsageError(
            "--grow with --container-image: it is the leader, in the container, that would submit further nodes, and "
            "Slurm's commands are not there; leave out --grow, or write --grow=off"
        )
    for given in job.sbatch:
        if given.name == "gpus":
            raise UsageError(
                f"--gpus={given.value} with --grow: counts the GPUs of the whole job, a joiner is one node; "
                "use --gpus-per-node=N"
            )
    if "ELASTIC_HPC_JOIN" not in text:
        raise UsageError(
            f"--template {job.template} with --grow: it has no ELASTIC_HPC_JOIN, by which one more node finds the job; "
            "take the lines that have it from the built-in template elastic.sbatch.j2, or leave out --grow"
        )
    return text


def _check_time(job: JobSpec, script: str) -> None:
    """Refuse a job that is warned as soon as it starts: it would save, return to the queue, and be warned again."""
    text = last(job.sbatch, "time")
    limit = time_limit(text) if text else None
    if limit and limit <= job.signal.lead and f"--signal={job.signal}" in script:
        lead = f"{job.signal.lead.total_seconds():.0f} s"
        ours = "--grace" if job.signal.lead == job.launch.grace + AFTER_GRACE else "--signal"
        raise UsageError(
            f"--time={text}: the workers are told to save {lead} before the end ({ours}), that is as soon as they have "
            f"started; expected more than {lead}, or a shorter {ours}"
        )


def short_times(job: JobSpec) -> Iterator[str]:
    """A warning for each end at which the site grants less time than the workers are promised. Asks Slurm."""
    grace, lead = job.launch.grace, job.signal.lead
    if lead < grace:
        yield f"--signal comes {as_text(lead)} s before the time limit, less than the {as_text(grace)} s of --grace"
    try:
        site = slurm.site(next((g.value for g in job.sbatch if g.name == "partition"), None))
    except ElasticError:
        return
    if not site.job_requeue:
        yield "this site does not requeue jobs (JobRequeue=0): instead of a requeue a new job goes on"
    preempted = site.preempt_mode not in {"OFF", ""} and not site.warns_before_preemption
    if preempted and site.grace_time < grace:
        yield (
            f"a preempted job has {as_text(site.grace_time)} s here (GraceTime), less than --grace {as_text(grace)}: "
            "save often enough"
        )
    if site.kill_wait < _KILL_WAIT:
        yield f"after SIGTERM the site waits {as_text(site.kill_wait)} s (KillWait): too short for workers to save"
