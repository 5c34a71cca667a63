"""The round that runs, as its leader sees it: who is in it, what went wrong first, does the job get on. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elastic_hpc.membership.causes import signature
from elastic_hpc.membership.messages import Failure, Plan, Status
from elastic_hpc.membership.policy import Decision

SETTLE = 0.25
"""Seconds in which the cause of a failure may still be reported, when its echo was faster."""

RECORD_EVERY = 10.0
"""Seconds between two entries in the record of how far the workers are."""

ALIVE_IS_PROGRESS = 60.0
"""A round that lived for so many seconds has got on, if its workers report no steps."""


@dataclass
class Steps:
    """How far the workers of a round have come, for the record. Times are seconds since the epoch."""

    _said: dict[str, Any] = field(default_factory=dict)
    _told: dict[str, Any] = field(default_factory=dict)
    _told_at: float = -RECORD_EVERY

    def hear(self, status: Status, *, first: bool) -> None:
        """``first``: it comes from the node of rank 0, whose loss is the one that counts."""
        said = self._said
        if status.step > said.get("step", -1):
            said |= {"step": status.step, "step_at": status.step_at}
            said.setdefault("first", status.first)
            said.setdefault("first_at", status.first_at)
        if status.loss is not None and (first or "loss" not in said):
            said["loss"] = status.loss

    def news(self, now: float, *, over: bool = False) -> dict[str, Any]:
        """What is to be told now, nothing if there is nothing new. ``over``: this is the last time."""
        if self._said == self._told or not (over or now - self._told_at >= RECORD_EVERY):
            return {}
        self._told, self._told_at = dict(self._said), now
        return self._told


@dataclass
class Starts:
    """How the workers of a round were started, for the record: told once, when all have said so."""

    _said: dict[int, Status] = field(default_factory=dict)
    _told: bool = False

    def hear(self, status: Status) -> None:
        """What its node says of its own workers."""
        if status.warm + status.cold:
            self._said[status.node] = status

    def news(self, workers: int, *, over: bool = False) -> dict[str, Any]:
        """What is to be told now; nothing if it was, or more is to come. ``workers``: so many the round has. ``over``:
        no more will come.
        """
        said = self._said.values()
        warm, cold = sum(status.warm for status in said), sum(status.cold for status in said)
        if self._told or not said or (warm + cold < workers and not over):
            return {}
        self._told = True
        why = sorted({status.cold_why for status in said if status.cold})
        return {"warm": warm, "cold": cold, "why": why, "standby_mb": max(status.standby_mb for status in said)}


@dataclass
class World:
    """A round, or nothing while one is gathered. Nodes are indices in Slurm's order, times the leader's."""

    formed: tuple[int, ...] = ()
    plans: dict[int, Plan] = field(default_factory=dict)
    since: float = 0.0
    lost: dict[int, str] = field(default_factory=dict)
    """Nodes that were lost before they finished, and why."""
    succeeded: set[int] = field(default_factory=set)
    drained: bool = False
    failure: Failure | None = None
    """The first one, of which others may be echoes."""
    failed_at: float = 0.0
    going: bool = False
    """Its workers have reported a step, or have begun to listen."""
    repeated: bool = False
    """The round before ended with the same failure, and no step was done in between."""
    change: Decision | None = None
    """Why the workers were asked to save and stop, for a new world."""
    changing_since: float = 0.0
    steps: Steps = field(default_factory=Steps)
    starts: Starts = field(default_factory=Starts)

    def on_success(self, status: Status) -> None:
        self.succeeded.add(status.node)
        self.drained = self.drained or status.drained

    def on_failure(self, failure: Failure, now: float) -> bool:
        """Whether it is the first one so far: none was known, or only an echo of it."""
        if self.failure is None:
            self.failed_at = now
        elif failure.collateral or not self.failure.collateral:
            return False
        self.failure = failure
        return True

    def is_settling(self, now: float) -> bool:
        """Only the echo of a failure is known, and for so short a time that its cause may follow."""
        return bool(self.failure and self.failure.collateral) and now - self.failed_at < SETTLE

    def end(self, inherited: str) -> tuple[str | None, str]:
        """Why the round is over, None if it is not, and the kind of that. ``inherited``: why the leader was lost."""
        lost = next(iter(self.lost.values()), "") or inherited
        if self.failure and not (self.failure.collateral and lost):
            return str(self.failure), self.failure.kind
        return lost or None, "node lost"


class Progress:
    """Whether the job gets on from one failure to the next."""

    def __init__(self) -> None:
        self.step = -1
        """Last training step that a worker reported, -1 for none."""
        self.last_failure: Failure | None = None
        self._failed_with, self._failed_at_step = "", -1

    def is_repeated(self, failure: Failure, alive: float) -> bool:
        """Whether the job stands still: it fails as the round before it did. This round lived for ``alive`` seconds. A
        signal may well come twice.
        """
        if failure.collateral or failure.kind in {"signal", "stopped"}:
            return False
        known, self._failed_with = self._failed_with, signature(failure.kind, failure.message)
        before, self._failed_at_step = self._failed_at_step, self.step
        got_on = self.step > before if self.step >= 0 else alive > ALIVE_IS_PROGRESS
        return known == self._failed_with and not got_on

    def on_end(self, failure: Failure | None) -> None:
        """A round ended, because of ``failure`` or of something else."""
        self.last_failure = failure or self.last_failure
        if failure is None:
            self._failed_with = ""
