"""The story of a job: its runs, rounds, faults and steps. Pure. ``story_builder`` makes it from a job's events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

_SPEED_WINDOW = 30.0
"""Seconds over which the speed is measured."""
_LATE = 20.0
"""Seconds after which a step may be on the record at the latest: the leader adds the last one each ten seconds."""
_LATE_STEPS = 5
"""A further allowance: as long as this number of steps, or as the longest pause between this number of reports."""


@dataclass(frozen=True)
class Fault:
    """A worker that failed, or a node that was lost."""

    time: float
    node: str
    kind: str
    """``node lost``, or the kind of failure: ``exception``, ``out of memory``, ``signal``, ``exit``, ``hang``, ..."""
    message: str
    rank: int | None = None
    traceback: str = ""
    known: str = ""
    """The name of the fault in the table of causes."""

    def __str__(self) -> str:
        return (
            f"{self.node} lost: {self.message}"
            if self.rank is None
            else f"rank {self.rank} on {self.node}: {self.message}"
        )


@dataclass(frozen=True)
class Sample:
    """How far the workers were at ``time``."""

    time: float
    step: int
    loss: float | None


@dataclass(frozen=True)
class Round:
    """One formation of the world. Times are seconds since the epoch."""

    number: int
    run: int
    nodes: tuple[str, ...]
    world_size: int
    restarts: int
    """Restarts charged before the round was formed."""
    formed: float
    gap: float | None
    """Seconds from ``broken`` of the previous round, or from the start of the run, to ``formed``."""
    leader: str = ""
    workers_kept: int = 0
    """Workers that kept their process from the previous round, in place."""
    not_kept: tuple[str, ...] = ()
    """Why workers that wanted to keep their process could not."""
    broken: float | None = None
    """When the cause of the round's end happened, as far as is known: for a lost node, the last contact with it."""
    ended: float | None = None
    """When the agents got the order to stop the workers, or the workers had finished."""
    cause: str = ""
    """What ended the round; empty while it runs."""
    charged: bool = False
    """Whether its end was charged to ``--max-restarts``."""
    first: int | None = None
    """The first step that the workers of this round reported, None for none."""
    first_at: float = 0.0
    """When the workers reported ``first``."""
    samples: tuple[Sample, ...] = ()
    faults: tuple[Fault, ...] = ()
    """What went wrong: first the cause, then its consequences."""

    @property
    def in_place(self) -> str:
        """How many workers kept their process, and why the others did not; empty if no worker wanted to."""
        kept = f"in place: {self.workers_kept} of {self.world_size} workers kept their process"
        not_kept = f"not in place: {'; '.join(self.not_kept)}"
        return ", ".join([kept] * bool(self.workers_kept) + [not_kept] * bool(self.not_kept))

    @property
    def last(self) -> int | None:
        """The last step that the workers of this round are known to have done."""
        return self.samples[-1].step if self.samples else None

    @property
    def last_at(self) -> float:
        return self.samples[-1].time if self.samples else self.first_at

    @property
    def loss(self) -> float | None:
        return next((sample.loss for sample in reversed(self.samples) if sample.loss is not None), None)


@dataclass(frozen=True)
class Run:
    """What happened between two passes through the queue. Times are seconds since the epoch, None for unknown."""

    number: int
    job: str
    granted: int
    """The job's own nodes."""
    began: float
    """When the first leader of the run began to lead."""
    submitted: float | None = None
    """When the job was put into the queue for this run."""
    started: float | None = None
    """When Slurm granted the nodes."""
    ends: float | None = None
    """The time limit of the run."""
    ended: float | None = None
    outcome: str = ""
    """``finished``, ``failed``, ``requeue``; empty while it runs, or if no agent was left to record the end."""
    cause: str = ""
    reason: str = ""
    charged: bool = False
    """Whether the requeue was charged to ``--max-requeues``."""
    given_back: tuple[float, ...] = ()
    """When Slurm got nodes of ``granted`` back, a moment for each node."""


@dataclass(frozen=True)
class JoinedNode:
    """A node that a joiner brought, and when."""

    node: str
    joined: float
    left: float | None = None
    taken: bool = False
    """Whether the joiner was preempted, cancelled or lost."""


@dataclass(frozen=True)
class Story:
    """Everything that can be learned from the record of a job."""

    runs: tuple[Run, ...] = ()
    rounds: tuple[Round, ...] = ()
    joiners: tuple[JoinedNode, ...] = ()
    barred: tuple[str, ...] = ()
    """Nodes that get no more workers, because workers failed there repeatedly."""
    apart: tuple[str, ...] = ()
    """Which nodes did not reach each other, in sentences."""
    slow: Mapping[str, float] = field(default_factory=dict)
    """By name, the nodes of the last round that are slower than the others, and by which factor."""
    was_slow: tuple[str, ...] = ()
    """The nodes that were slow when they were last measured, in sentences."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Why nodes of the last run take no part, by name: they were lost, never came, or are not allowed to."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """The limits that the user has set, with the names of ``policy.Policy``; empty if they are not known."""
    hang_timeout: float | None = None
    """Seconds without a sign of life after which workers count as hung; None for never, or if not known yet."""
    hang_timeout_reason: str = ""
    restarts: int = 0
    requeues: int = 0
    waiting: str = ""
    """What the next round waits for; empty if it does not wait, or not for long."""
    waiting_since: float = 0.0
    not_growing: str = ""
    """What keeps further nodes from coming; empty if nothing does."""
    last_time: float = 0.0
    """The time of the last event."""
    damaged: int = 0
    """Events that could not be understood."""

    @property
    def current(self) -> Round | None:
        """The round that runs."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].ended is None else None

    @cached_property
    def reports(self) -> bool:
        """Whether the script reports its steps."""
        return any(round.first is not None for round in self.rounds)

    @cached_property
    def resumed(self) -> frozenset[int]:
        """The numbers of the runs that began after an end of the job, as another Slurm job: by ``--resume``."""
        pairs = pairwise(self.runs)
        return frozenset(run.number for old, run in pairs if run.job != old.job and old.outcome != "requeue")

    def kept(self, round: Round) -> int:
        """How many steps of ``round`` no later round repeated."""
        if round.first is None or round.last is None:
            return 0
        return max(0, min(round.last + 1, self._resumed_at.get(round.number, round.last + 1)) - round.first)

    @cached_property
    def _resumed_at(self) -> dict[int, int]:
        """By round, the lowest step with which a later round began."""
        found: dict[int, int] = {}
        lowest: int | None = None
        for round in reversed(self.rounds):
            if lowest is not None:
                found[round.number] = lowest
            if round.first is not None:
                lowest = round.first if lowest is None else min(lowest, round.first)
        return found

    def repeated(self, round: Round) -> int:
        """How many steps of ``round`` were repeated."""
        return (
            round.last - round.first + 1 - self.kept(round) if round.first is not None and round.last is not None else 0
        )

    @property
    def steps_per_second(self) -> float | None:
        """Speed of the last steps of the last round; None if steps are not reported."""
        if not self.rounds or len(self.rounds[-1].samples) < 2:
            return None
        samples = self.rounds[-1].samples
        last = samples[-1]
        first = next((s for s in reversed(samples) if last.time - s.time >= _SPEED_WINDOW), samples[0])
        return (last.step - first.step) / (last.time - first.time) if last.time > first.time else None

    def no_step_for(self, now: float) -> float | None:
        """Seconds since the last step of the round that runs, if a step is overdue; else None. ``now``: seconds since
        the epoch.
        """
        if not self.current or not (speed := self.steps_per_second):
            return None
        since = now - self.current.last_at
        times = [sample.time for sample in self.current.samples[-_LATE_STEPS:]]
        pause = max((after - before for before, after in pairwise(times)), default=0.0)
        return since if since > _LATE + max(_LATE_STEPS / speed, pause) else None
