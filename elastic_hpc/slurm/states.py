"""What Slurm says of jobs, and the states that they can be in. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta

from elastic_hpc.errors import SlurmError

WAITS = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
"""States of a job that waits in the queue."""

LIVES = WAITS | {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
"""States of a job that is not over."""


@dataclass(frozen=True)
class SlurmJob:
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


def duration(text: str) -> timedelta | None:
    """``text`` in Slurm's notation, [DAYS-][[HOURS:]MINUTES:]SECONDS; None for UNLIMITED. Raises SlurmError."""
    if text == "UNLIMITED":
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text, re.ASCII)
    if match is None:
        raise SlurmError(f"expected a time like 1-12:00:00, not {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
