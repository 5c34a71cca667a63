"""How many joiners, further jobs that bring one node each, a job needs, and when a failed attempt is repeated. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from elastic_hpc.membership.nodes import joiner
from elastic_hpc.membership.roster import Host

TOO_LATE = 300.0
"""With fewer seconds until the end of the job, no further node is worth starting."""

RETRY, RETRY_AT_MOST = 10.0, 600.0
"""Seconds until a failed attempt is repeated: ``RETRY`` at first, doubled each time, at most ``RETRY_AT_MOST``."""

WORTH = 600.0
"""A joiner that took part for this many seconds was worth the changes of the world that it caused."""

PREEMPTED = "preempted"
"""Why a joiner must leave that Slurm preempts (``slurm.warning_reason``)."""

_HELD = re.compile(
    r"(Assoc|QOS|Account|Association)\w+|JobHeld\w+|Invalid\w+|\w+NotAllowed|Partition(Down|Inactive|\w+Limit)"
    r"|MaxMemPerLimit|BadConstraints|DependencyNeverSatisfied|JobLaunchFailure|LaunchFailed\w*",
    re.IGNORECASE,
)
"""Slurm's reasons why a joiner waits that free nodes do not remove: limits of the user, account or QOS, against which
the requesting job counts too, a hold, or a refusal.
"""


@dataclass(frozen=True)
class Needs:
    """What a leader could use."""

    nodes: int
    """How many nodes it needs beyond the connected nodes."""
    joiners: frozenset[int]
    """Numbers of the joiners that are connected (``nodes.FIRST_JOINER``)."""
    names: frozenset[str]
    """Slurm's names of the connected nodes, except those in ``taken``, and of the nodes that get no workers."""
    missing: tuple[Host, ...]
    """The job's own nodes whose agents are lost."""
    over: bool
    """The job ends, or returns to the queue."""
    surplus: tuple[Host, ...] = ()
    """The job's own nodes that have left, to be returned to Slurm."""
    taken: frozenset[int] = frozenset()
    """Numbers of the joiners that were connected, and leave or have left early: preempted, cancelled, lost."""


class JoinerJob(Protocol):
    """A job that brings a node; usually a ``slurm.Joiner``."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def time_limit(self) -> timedelta | None: ...


@dataclass
class Backoff:
    """When to repeat an attempt that has failed."""

    first: float = RETRY
    """Seconds until the first repetition."""
    at: float = 0.0
    """When to try again, on the caller's clock."""
    _wait: float | None = field(default=None, repr=False)

    def failed(self, now: float) -> None:
        wait = self.first if self._wait is None else self._wait
        self.at, self._wait = now + wait, min(max(2 * wait, RETRY), RETRY_AT_MOST)

    def succeeded(self) -> None:
        self.at, self._wait = 0.0, None


class Patience(Backoff):
    """When to request a joiner after joiners were taken: at once, but later and later if joiners are taken soon after
    they have come, as each joiner costs two changes of the world.
    """

    def __init__(self) -> None:
        super().__init__(first=0.0)

    def taken(self, now: float, stayed: float) -> bool:
        """A joiner was taken after ``stayed`` seconds, or several at once; then the longest time counts. Returns
        whether the next request is therefore delayed.
        """
        if stayed >= WORTH:
            self.succeeded()
        if now < self.at + RETRY:  # taken with the last one, by the same preemption
            return False
        self.failed(now)
        return self.at > now


@dataclass(frozen=True)
class Growth:
    """How many joiners to submit, which to cancel or shorten, and how many are then on their way."""

    submit: int
    cancel: tuple[str, ...]
    """Ids of jobs that wait in the queue and are no longer needed."""
    starting: int
    """Jobs that have started and whose agents are not connected yet."""
    pending: int
    """Jobs that wait in the queue for nodes and stay there."""
    shorten: tuple[str, ...] = ()
    """Ids of waiting jobs whose time limit is beyond the end of this job: shorter jobs start earlier."""
    held: tuple[tuple[str, str], ...] = ()
    """Ids of jobs that stay in the queue and that need more than free nodes to start, with Slurm's reason. They are not
    on their way, and no other job is submitted in their place.
    """


def plan_growth(
    needs: Needs, jobs: Collection[JoinerJob], *, came: Collection[int], restarting: int, remaining: float
) -> Growth:
    """What to do to meet ``needs``.

    ``jobs``: all joiners that Slurm knows of. ``came``: numbers of the joiners that have been connected; if such a
    joiner is not connected now, it is leaving, or lost. ``restarting``: number of agents that are being restarted.
    ``remaining``: seconds until the job ends.
    """
    waiting = [job for job in jobs if job.state == "PENDING"]
    starting = [job for job in jobs if _is_starting(job) and joiner(job.id) not in came]
    wanted = 0 if remaining < TOO_LATE or needs.over else needs.nodes
    lacking = wanted - restarting - len(starting) - len(waiting)
    waiting.sort(key=lambda job: int(job.id))
    waiting, surplus = waiting[: (kept := max(0, len(waiting) + min(0, lacking)))], waiting[kept:]
    held = tuple((job.id, job.reason) for job in waiting if _HELD.fullmatch(job.reason))
    return Growth(
        submit=max(0, lacking),
        cancel=tuple(job.id for job in surplus),
        starting=len(starting),
        pending=len(waiting) - len(held),
        shorten=tuple(job.id for job in waiting if _is_longer(job.time_limit, remaining)),
        held=held,
    )


def _is_longer(limit: timedelta | None, remaining: float) -> bool:
    """Whether ``limit`` is longer by a tenth at least: a smaller difference would change the limit repeatedly."""
    return remaining < float("inf") and (limit is None or limit.total_seconds() > 1.1 * remaining)


def _is_starting(job: JoinerJob) -> bool:
    return job.state in {"CONFIGURING", "RUNNING"}
