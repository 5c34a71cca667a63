"""What Slurm says about a job, and the end of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client

# What scancel says of jobs that have ended; by version and number of jobs, that is an error or not.
_ENDED = re.compile("already (completing|completed|finished)|Invalid job id specified", re.IGNORECASE)


WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
"""States of a job that waits in the queue."""

LIVES = WAITS | {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
"""States of a job that is not over."""

_PATH = r".*?(?= \w+=|\s*$)"


@dataclass(frozen=True)
class Job:
    """What slurmctld says about a job. Lists of nodes are in Slurm's notation, empty for none."""

    id: str
    """SLURM_JOB_ID, a number also in arrays."""
    state: str
    """Slurm's word, RUNNING for one. As long as a job is COMPLETING, Slurm does not say what it will be then."""
    reason: str
    restarts: int
    """Requeues, for whatever cause; counted as soon as one is accepted."""
    may_requeue: bool
    """False after ``--no-requeue``, where the site has JobRequeue=0, or when an administrator took it back."""
    partitions: tuple[str, ...]
    """One once it has started."""
    nodes: str
    """Allocated and not yet lost in Slurm's eyes."""
    batch_host: str
    required: str
    excluded: str
    folder: str
    """Working directory."""
    preempt_time: str
    """When its end by preemption was announced, while it is running; then, when it came. Empty for never."""
    end_time: str
    submit_time: str
    """When it was put into the queue last, by its submission or a requeue."""
    start_time: str
    """When it was started, or is expected to be; empty if unknown."""
    account: str
    qos: str
    time_limit: str
    """In Slurm's notation, 1-12:00:00 or UNLIMITED."""
    run_time: str
    """What of it is used up."""
    exit_code: str
    """In Slurm's notation, CODE:SIGNAL."""
    output: str
    """Where its batch script writes to."""
    error: str

    @property
    def remaining(self) -> timedelta | None:
        """What is left of its time, by the controller's count; None for no limit. Raises SlurmError if unknown."""
        limit, used = duration(self.time_limit), duration(self.run_time)
        return None if limit is None or used is None else limit - used

    def becomes(self, run: int | None) -> str:
        """``state``, or if that is COMPLETING, what the rest says to a process of ``run`` (SLURM_RESTART_COUNT):

        REQUEUED by whomever, TIMEOUT, PREEMPTED where the site does not requeue then, FAILED, or CANCELLED, which is
        also what every other end looks like. At the moment of SIGTERM, RUNNING may still be said for a second.
        """
        if self.state != "COMPLETING":
            return self.state
        if run is not None and self.restarts > run:
            return "REQUEUED"
        if self.preempt_time and self.preempt_time == self.end_time:  # else cancelled in its grace time
            return "PREEMPTED"
        return {"TimeLimit": "TIMEOUT", "NonZeroExitCode": "FAILED"}.get(self.reason, "CANCELLED")


def show_job(job: str) -> Job:
    """Ask for ``job``, for an array task ``JOB_TASK``. Raises SlurmError if Slurm knows it no longer."""
    ids, _, said = client.scontrol("show", "job", "--oneliner", job).partition(" UserId=")  # its name may hold anything

    def field(name: str, value: str = r"\S*") -> str:
        match = re.search(rf" {name}=({value})", said)
        return "" if match is None or match[1] == "(null)" else match[1]

    return Job(
        id=ids.partition(" ")[0].removeprefix("JobId="),
        state=field("JobState"),
        reason=field("Reason"),
        restarts=int(field("Restarts") or 0),
        may_requeue=field("Requeue") == "1",
        partitions=tuple(filter(None, field("Partition").split(","))),
        nodes=field("NodeList"),
        batch_host=field("BatchHost"),
        required=field("ReqNodeList"),
        excluded=field("ExcNodeList"),
        preempt_time=field("PreemptTime").removeprefix("None"),
        end_time=field("EndTime"),
        submit_time=field("SubmitTime"),
        start_time=field("StartTime").removeprefix("Unknown"),
        account=field("Account"),
        qos=field("QOS").removeprefix("N/A"),
        time_limit=field("TimeLimit"),
        run_time=field("RunTime"),
        exit_code=field("ExitCode"),
        output=field("StdOut", _PATH),
        error=field("StdErr", _PATH),
        folder=field("WorkDir", _PATH),
    )


@dataclass(frozen=True)
class Queued:
    """What squeue says of a job. Times are seconds since the epoch, None for unknown."""

    state: str
    starts: float | None
    """When it has started, or is expected to."""
    ends: float | None
    """Its time limit."""
    reason: str
    """Why it waits, in Slurm's words."""


def queue(*jobs: str) -> dict[str, Queued]:
    """Those of ``jobs`` (``JOB`` or ``JOB_TASK``) that Slurm still knows. Raises SlurmError if it cannot be asked."""
    if not jobs:
        return {}
    try:
        asked = ("--array", "--states=all", f"--jobs={','.join(jobs)}")
        said = client.run("squeue", "--noheader", *asked, "--format=%i|%T|%S|%e|%r")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    rows = (line.split("|", 4) for line in said.splitlines() if line)
    return {id: Queued(state, epoch(start), epoch(end), reason) for id, state, start, end, reason in rows}


def states(*jobs: str) -> dict[str, str]:
    """Slurm's word for the state of each of ``jobs``; see ``queue``."""
    return {job: known.state for job, known in queue(*jobs).items()}


def job_state(job: str, run: int | None = None) -> str:
    """Slurm's word for the state of ``job``, or what it becomes when it is completing; see ``Job.becomes``."""
    return show_job(job).becomes(run)


def duration(text: str) -> timedelta | None:
    """``text`` in Slurm's notation, [DAYS-][[HOURS:]MINUTES:]SECONDS; None for UNLIMITED. Raises SlurmError."""
    if text == "UNLIMITED":
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text, re.ASCII)
    if match is None:
        raise SlurmError(f"expected a time like 1-12:00:00, not {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def epoch(text: str) -> float | None:
    """A moment in Slurm's notation, 2026-11-25T08:00:00 in this machine's time zone, as seconds since the epoch; None
    for anything else: ``Unknown``, ``None``, nothing.
    """
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def warn(job: str) -> None:
    """Send the batch script of ``job`` its warning signal, as Slurm does before the time limit. Raises SlurmError."""
    client.run("scancel", "--batch", "--signal=USR2", job)


def cancel(*jobs: str) -> None:
    """End ``jobs``, running or waiting. One that has ended already is no error. Raises SlurmError."""
    if not jobs:
        return
    try:
        client.run("scancel", *jobs)
    except SlurmError as error:
        if not all(_ENDED.search(part) for part in str(error).split("; ")):
            raise
