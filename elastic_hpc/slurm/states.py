"""What Slurm says of jobs, and the states that jobs and nodes can be in. Pure."""

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
    """Slurm's word, for example RUNNING. During COMPLETING, Slurm does not say what comes next; see ``becomes``."""
    reason: str
    restarts: int
    """Requeues, for whatever cause; counted as soon as Slurm accepts them."""
    may_requeue: bool
    """False after ``--no-requeue``, where the site has JobRequeue=0, or if an administrator has forbidden it."""
    partitions: tuple[str, ...]
    """A single partition once the job has started."""
    nodes: str
    """Allocated and not yet lost in Slurm's eyes."""
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
    """How much of ``time_limit`` is used up."""
    exit_code: str
    """In Slurm's notation, CODE:SIGNAL."""
    output: str
    """The file of the batch script's stdout, ``error`` that of its stderr."""
    error: str

    @property
    def remaining(self) -> timedelta | None:
        """What is left of its time, by the controller's count; None for no limit. Raises SlurmError if unknown."""
        limit, used = duration(self.time_limit), duration(self.run_time)
        return None if limit is None or used is None else limit - used

    def becomes(self, run: int | None) -> str:
        """``state``; if that is COMPLETING, the state that follows, as far as a process of the job can tell in ``run``
        (SLURM_RESTART_COUNT):

        REQUEUED by any caller, TIMEOUT, PREEMPTED where the site does not requeue then, FAILED, or CANCELLED, which is
        also what every other end looks like. Slurm may still say RUNNING for a second after SIGTERM.
        """
        if self.state != "COMPLETING":
            return self.state
        if run is not None and self.restarts > run:
            return "REQUEUED"
        if self.preempt_time and self.preempt_time == self.end_time:  # else it was cancelled in its grace time
            return "PREEMPTED"
        return {"TimeLimit": "TIMEOUT", "NonZeroExitCode": "FAILED"}.get(self.reason, "CANCELLED")


@dataclass(frozen=True)
class Queued:
    """What squeue says of a job. Times are seconds since the epoch, None for unknown."""

    state: str
    ends: float | None
    """Its time limit."""
    reason: str
    """Why it waits, in Slurm's words."""
    starts: float | None = None
    """When it started; while it waits, when Slurm expects it to start."""


@dataclass(frozen=True)
class Estimate:
    """When Slurm would start a job of ``least`` to ``most`` nodes."""

    least: int
    most: int
    starts: float | None = None
    """Seconds since the epoch, None if Slurm gives no time."""
    nodes: int = 0
    """How many nodes it would get; 0 for unknown."""
    refused: str = ""
    """Why Slurm refuses such a job; empty if it would take it."""


def words(state: str) -> set[str]:
    """The words in the state of a node, ``MIXED+DRAIN`` for example."""
    return {word.rstrip("*~#!%$@^-") for word in state.split("+")}


_NO_LIMIT = frozenset({"UNLIMITED", "365-00:00:00"})  # the year is what 26.05 says for no limit


def duration(text: str) -> timedelta | None:
    """``text`` in Slurm's notation, [DAYS-][[HOURS:]MINUTES:]SECONDS; None for no limit. Raises SlurmError."""
    if text in _NO_LIMIT:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text, re.ASCII)
    if match is None:
        raise SlurmError(f"expected a time like 1-12:00:00, not {text!r}")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
