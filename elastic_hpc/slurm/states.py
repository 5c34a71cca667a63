"""What Slurm says about jobs, and the states of jobs and nodes. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta

from elastic_hpc.errors import SlurmError

WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
"""States of a job that waits in the queue."""

LIVES = WAITS | {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
"""States of an active job."""


@dataclass(frozen=True)
class SlurmJob:
    """What slurmctld says about a job. Lists of nodes are in Slurm's notation; empty for no nodes."""

    id: str
    """SLURM_JOB_ID, a number also in arrays."""
    state: str
    """Slurm's word, for example RUNNING. During COMPLETING, Slurm does not say what comes next; see ``becomes``."""
    reason: str
    restarts: int
    """Number of requeues, for any reason; Slurm counts a requeue as soon as it accepts it."""
    may_requeue: bool
    """False after ``--no-requeue``, where the site has JobRequeue=0, or if an administrator has forbidden it."""
    partitions: tuple[str, ...]
    """A single partition once the job has started."""
    nodes: str
    """The allocated nodes, except those whose loss Slurm has noticed."""
    batch_host: str
    required: str
    excluded: str
    folder: str
    """Working directory."""
    preempt_time: str
    """While the job runs, when its preemption was announced; later, when the job was preempted. Empty for never."""
    end_time: str
    submit_time: str
    """When the job was last put into the queue, by its submission or a requeue."""
    start_time: str
    """When the job started, or is expected to start; empty if unknown."""
    account: str
    qos: str
    time_limit: str
    """In Slurm's notation, 1-12:00:00; UNLIMITED for no limit, in newer versions 365-00:00:00."""
    run_time: str
    """The used part of ``time_limit``."""
    exit_code: str
    """In Slurm's notation, CODE:SIGNAL."""
    output: str
    """The file of the batch script's stdout; ``error``: the file of its stderr."""
    error: str

    @property
    def remaining(self) -> timedelta | None:
        """Time until the time limit, as slurmctld counts it; None for no limit. Raises SlurmError if unknown."""
        limit, used = duration(self.time_limit), duration(self.run_time)
        return None if limit is None or used is None else limit - used

    def becomes(self, run: int | None) -> str:
        """``state``; if that is COMPLETING, the state that follows, as far as a process of the job in ``run``
        (SLURM_RESTART_COUNT) can know it:

        REQUEUED by any caller, TIMEOUT, PREEMPTED if the site does not requeue preempted jobs, FAILED, or CANCELLED,
        which also stands for every other end. Slurm may still say RUNNING for a second after SIGTERM.
        """
        if self.state != "COMPLETING":
            return self.state
        if run is not None and self.restarts > run:
            return "REQUEUED"
        if self.preempt_time and self.preempt_time == self.end_time:  # else the job was cancelled in its grace time
            return "PREEMPTED"
        return {"TimeLimit": "TIMEOUT", "NonZeroExitCode": "FAILED"}.get(self.reason, "CANCELLED")


@dataclass(frozen=True)
class Queued:
    """What squeue says about a job. Times are seconds since the epoch, None for unknown."""

    state: str
    ends: float | None
    """Its time limit."""
    reason: str
    """Why the job waits, in Slurm's words."""
    starts: float | None = None
    """When the job started; while it waits, when Slurm expects it to start."""


@dataclass(frozen=True)
class Estimate:
    """When Slurm would start a job of ``least`` to ``most`` nodes."""

    least: int
    most: int
    starts: float | None = None
    """Seconds since the epoch, None if Slurm gives no time."""
    nodes: int = 0
    """How many nodes the job would get; 0 for unknown."""
    refused: str = ""
    """Why Slurm refuses such a job; empty if Slurm would accept it."""


def words(state: str) -> set[str]:
    """The words in the state of a node, for example in ``MIXED+DRAIN``."""
    return {word.rstrip("*~#!%$@^-") for word in state.split("+")}


_NO_LIMIT = frozenset({"UNLIMITED", "365-00:00:00"})  # 26.05 prints a year for no limit


def duration(text: str) -> timedelta | None:
    """``text`` in Slurm's notation, [DAYS-][[HOURS:]MINUTES:]SECONDS; None for no limit. Raises SlurmError."""
    if text in _NO_LIMIT:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text, re.ASCII)
    if match is None:
        raise SlurmError(f"expected a time like 1-12:00:00, not {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
