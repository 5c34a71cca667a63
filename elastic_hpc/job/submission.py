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
from elastic_hpc.options.sbatch_lines import FOR_JOINERS
from elastic_hpc.record.folders import make_log_dir

_KILL_WAIT = timedelta(seconds=25)  # the agents give the workers 20 s after SIGTERM


@contextlib.contextmanager
def prepared(job: JobSpec, *, will_run: bool = True, folder: str = "") -> Iterator[bytes]:
    """Put in place what ``job`` needs, and yield its batch script, for the body to submit. Raises UsageError.

    If the body raises UsageError, the copy of the code is removed. ``will_run``: False if Slurm only checks the job.
    ``folder``: the folder from which the job is submitted; empty for the working directory.
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
        outputs.make_folders(job.sbatch, os.path.join(folder or os.getcwd(), last(job.sbatch, "chdir") or ""))
    if job.code and will_run and not job.keeps_code and job.token in script:
        snapshot.put_aside(job.code, staged, snapshot=job.snapshot)
    try:
        yield os.fsencode(script)
    except UsageError as error:  # Slurm refused the job; after other errors Slurm may have it
        snapshot.discard(staged)
        raise UsageError(f"{error}{from_elsewhere(job, str(error))}") from None


def from_elsewhere(job: JobSpec, refusal: str) -> str:
    """The options that ``refusal`` names and that the user has not typed for this job, with their sources."""
    words = {word.strip("-") for word in re.findall(r"[a-z-]+", refusal.lower())}
    typed = (COMMAND_LINE, PYTHON, NAME_OF_SCRIPT)
    found = [f"{g}, {g.source}" for g in job.sbatch if g.name in words and g.source not in typed]
    return f" ({'; '.join(found)})" if found else ""


def checked(job: JobSpec) -> str:
    """The batch script of ``job``. Raises UsageError also for a job that would fail later."""
    text = render(job)
    _check_times(job, text)
    if job.snapshot and os.path.basename(job.staged) not in text:
        raise UsageError(
            f"--template {job.template} with --snapshot: it does not take the copy of the code; include snapshot.j2 "
            "and workdir.j2 as the built-in template elastic.sbatch.j2 does, or leave out --snapshot"
        )
    _check_yielding(job)
    _check_gpus(job)
    if not job.launch.grow:
        return text
    if job.container:
        raise UsageError(
            "--grow with --container-image: it is the leader, in the container, that would submit further nodes, and "
            "Slurm's commands are not there; leave out --grow, or write --grow=off"
        )
    if "ELASTIC_HPC_JOIN" not in text:
        raise UsageError(
            f"--template {job.template} with --grow: it has no ELASTIC_HPC_JOIN, by which one more node finds the job; "
            "take the lines that have it from the built-in template elastic.sbatch.j2, or leave out --grow"
        )
    if job.joiners and f"\n{FOR_JOINERS}" not in text:
        raise UsageError(
            f"--template {job.template} with --grow-{job.joiners[0].name}: it has no {FOR_JOINERS} lines; include "
            "directives.j2 as the built-in template elastic.sbatch.j2 does"
        )
    return text


def _check_yielding(job: JobSpec) -> None:
    launch = job.launch
    if launch.yield_to and job.container:
        raise UsageError(
            f"--yield-to {launch.yield_to} with --container-image: it is the leader, in the container, that would look "
            "at the queue, and Slurm's commands are not there; leave out --yield-to"
        )
    if launch.yield_to and launch.nodes.min == launch.nodes.max and not launch.spares:
        raise UsageError(
            f"--yield-to {launch.yield_to} with --nodes {launch.nodes.slurm}: only nodes above MIN are given back, and "
            f"there are none; expected a range, for example --nodes 1:{max(2, launch.nodes.max)}"
        )


def _check_gpus(job: JobSpec) -> None:
    nodes = job.launch.nodes
    varies = nodes.min != nodes.max or job.launch.spares or job.launch.grow
    for given in job.sbatch:
        if given.name == "gpus" and varies and not given.source.startswith("job "):  # one that --resume continues
            source = "" if given.source in {COMMAND_LINE, PYTHON} else f" ({given.source})"
            raise UsageError(
                f"{given}{source}: is for the whole job, and its number of nodes varies; use --gpus-per-node=N"
            )


def _check_times(job: JobSpec, script: str) -> None:
    """Refuse a job that Slurm would warn as soon as it starts: it would save, return to the queue, and be warned again.
    Joiners get the same warning.
    """
    for flag, options in (("--time", job.sbatch), ("--grow-time", job.joiners)):
        text = last(options, "time")
        limit = time_limit(text) if text else None
        if limit and limit <= job.signal.lead and f"--signal={job.signal}" in script:
            lead = f"{job.signal.lead.total_seconds():.0f} s"
            grace = as_text(job.launch.grace)
            by_grace = job.signal.lead == job.launch.grace + AFTER_GRACE
            ours, why = ("--grace", f"--grace {grace} s plus 30 s") if by_grace else ("--signal", "--signal")
            raise UsageError(
                f"{flag}={text}: Slurm warns the job {lead} before its end ({why}), that is as soon as it starts; "
                f"expected more than {lead}, or a shorter {ours}"
            )


def short_times(job: JobSpec) -> Iterator[str]:
    """A warning for each kind of end for which the site grants the workers less time than promised. Asks Slurm."""
    grace, lead, partition = job.launch.grace, job.signal.lead, last(job.sbatch, "partition")
    if lead < grace:
        yield f"--signal comes {as_text(lead)} s before the time limit, less than the {as_text(grace)} s of --grace"
    try:
        site = slurm.site(partition)
        of_joiners = slurm.site(last(job.joiners, "partition") or partition) if job.joiners else site
    except ElasticError:
        return
    if not site.job_requeue:
        yield "JobRequeue=0: if this site does not allow --requeue, a new job continues instead of a requeued job"
    for who, there in {"job": site, "joiner": of_joiners}.items():
        preempted = there.preempt_mode not in {"OFF", ""} and not there.warns_before_preemption
        if preempted and there.grace_time < grace and (who == "job" or there != site):
            yield (
                f"a preempted {who} has {as_text(there.grace_time)} s here (GraceTime), less than --grace "
                f"{as_text(grace)}: save often enough"
            )
    if site.kill_wait < _KILL_WAIT:
        yield f"after SIGTERM the site waits {as_text(site.kill_wait)} s (KillWait): too short for workers to save"
