"""The running round, as its leader sees it: its nodes, what went wrong first, and how far its workers are. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_hpc.membership.failures import NOBODY, Blame, FailureHistory
from elastic_hpc.membership.messages import Failure, Plan, Status
from elastic_hpc.membership.policy import Decision, RoundView

SETTLE = 0.25
"""Seconds in which the cause of a failure may still be reported, when its echo was faster."""

OTHERS = 2.0
"""Seconds in which other nodes may still fail in the same way, before a node is blamed for a failure."""

RECORD_EVERY = 10.0
"""Seconds between two entries in the record of how far the workers are."""


@dataclass
class StepReport:
    """How far the workers of a round are, for the record. Times are seconds since the epoch."""

    _latest: dict[str, Any] = field(default_factory=dict)
    _recorded: dict[str, Any] = field(default_factory=dict)
    _recorded_at: float = -RECORD_EVERY

    def update(self, status: Status, *, rank0: bool) -> None:
        """``rank0``: the status comes from the node of rank 0, whose loss is recorded if it reports any."""
        latest = self._latest
        if status.step > latest.get("step", -1):
            latest |= {"step": status.step, "step_at": status.step_at}
            latest.setdefault("first", status.first)
            latest.setdefault("first_at", status.first_at)
        if status.loss is not None and (rank0 or "loss" not in latest):
            latest["loss"] = status.loss

    @property
    def step(self) -> int | None:
        """The last step that was reported."""
        return self._latest.get("step")

    def due(self, now: float, *, over: bool) -> dict[str, Any]:
        """What to record now; empty if nothing has changed, or the last entry is recent. ``over``: the round ends."""
        if self._latest == self._recorded or not (over or now - self._recorded_at >= RECORD_EVERY):
            return {}
        self._recorded, self._recorded_at = dict(self._latest), now
        return self._recorded


@dataclass
class StartReport:
    """How the workers of a round were started, for the record: one entry, when all nodes have reported."""

    _by_node: dict[int, Status] = field(default_factory=dict)
    _recorded: bool = False

    def update(self, status: Status) -> None:
        if status.warm + status.cold + status.kept:
            self._by_node[status.node] = status

    def due(self, workers: int, *, over: bool) -> dict[str, Any]:
        """What to record now, if anything. ``workers``: number of workers in the round. ``over``: the round ends."""
        reported = self._by_node.values()
        counts = {name: sum(getattr(status, name) for status in reported) for name in ("kept", "warm", "cold")}
        if self._recorded or not reported or (sum(counts.values()) < workers and not over):
            return {}
        self._recorded = True
        cold = {status.cold_why for status in reported if status.cold}
        not_kept = sorted({status.not_kept for status in reported if status.not_kept})
        why = [*sorted(cold), *(f"a worker could not be kept: {reason}" for reason in not_kept)]
        memory = max(status.standby_mb for status in reported)
        return {**counts, "why": why, "not_kept": not_kept, "standby_mb": memory}


@dataclass
class World:
    """The running round; empty while a round is gathered. Nodes are numbers, times are on the leader's clock."""

    formed: tuple[int, ...] = ()
    """The nodes, in rank order."""
    plans: dict[int, Plan] = field(default_factory=dict)
    formed_at: float = 0.0
    lost: dict[int, str] = field(default_factory=dict)
    """Nodes that were lost before they finished, and why."""
    succeeded: set[int] = field(default_factory=set)
    drained: bool = False
    failure: Failure | None = None
    """The first failure that is no echo of another failure; until the cause is reported, an echo."""
    failed_at: float = 0.0
    going: bool = False
    """The workers have reported a step or, unless they are live, that they listen for a drain."""
    live: bool = False
    """Workers of the round are live (``Status.live``)."""
    blame: Blame = NOBODY
    """What earlier failures show about this failure."""
    suspect: int | None = None
    """The node that is to blame; None if no node is."""
    shared: bool = False
    """Another node has failed in the same way."""
    change: Decision | None = None
    """Why the workers must save and stop for a new world."""
    changed_at: float = 0.0
    _failures: dict[int, Failure] = field(default_factory=dict)
    """The last failure that each node has reported."""
    _steps: StepReport = field(default_factory=StepReport)
    _starts: StartReport = field(default_factory=StartReport)

    @property
    def step(self) -> int | None:
        """The last step of the round that its workers have reported."""
        return self._steps.step

    def on_status(
        self, status: Status, history: FailureHistory, now: float, *, round: int, is_news: bool
    ) -> dict[str, Any] | None:
        """A node has sent ``status`` while ``round`` runs. ``is_news``: a field that decisions depend on has changed.
        Returns the fields of the event ``failure`` if a worker of this round has failed.
        """
        if status.node not in self.plans:
            return None
        if status.round != round:
            if status.state == "idle":
                self.lost.setdefault(status.node, f"{status.name} lost: it has left the round")
            return None
        self._steps.update(status, rank0=status.node == self.formed[0])
        self._starts.update(status)
        # live workers listen before their new world has formed: a change then would have to wait until it has
        self.going = self.going or status.step >= 0 or (status.listens and not status.live)
        self.live = self.live or status.live
        history.step = max(history.step, status.step)
        if is_news and status.state == "succeeded":
            self.succeeded.add(status.node)
            self.drained = self.drained or status.drained
        is_known = self._failures.get(status.node) == status.failure  # the status has other news, such as a probe's
        if is_news and status.state == "failed" and status.failure and not is_known:
            self._failures[status.node] = status.failure
            return {"first": self._on_failure(status.failure, status.node, history, now), **asdict(status.failure)}
        return None

    def on_hang(self, failure: Failure, node: int, history: FailureHistory, now: float) -> dict[str, Any]:
        """The leader has found that the workers hang. Returns the fields of the event ``failure``."""
        return {"first": self._on_failure(failure, node, history, now), **asdict(failure)}

    def on_lost(self, node: int, reason: str) -> None:
        """The agent of ``node`` is lost, or its workers cannot be killed."""
        if node in self.plans and node not in self.succeeded:
            self.lost[node] = reason

    def _on_failure(self, failure: Failure, node: int, history: FailureHistory, now: float) -> bool:
        """Whether ``failure`` is the cause, as far as is known: no failure was known before, or only an echo."""
        if self.failure and (failure.collateral or not self.failure.collateral):
            if history.is_same(failure, self.failure):
                self.shared = True
                self.suspect = self.suspect if self._leaves else None
            return False
        self.blame = history.judge(failure, now - self.formed_at, alone=len(self.formed) == 1)
        self.suspect = node if self.blame.node else None
        self.shared = len(self.formed) == 1
        if self.failure is None or self.settles:
            self.failed_at = now
        self.failure = failure
        return True

    @property
    def of_network(self) -> bool:
        """Whether the failure may be the network's: workers hang, or have lost a peer, and no node is lost."""
        failure = self.failure
        return bool(
            failure and (failure.collateral or failure.kind == "hang") and len(self.formed) > 1 and not self.lost
        )

    @property
    def settled_at(self) -> float:
        """Until when further reports may explain the failure."""
        if self.failure and self.failure.collateral:
            return self.failed_at + SETTLE
        return self.failed_at + OTHERS if self.settles else 0.0

    @property
    def settles(self) -> bool:
        """Whether the decision depends on other nodes failing in the same way."""
        if self.blame.known and self.suspect is None:
            return self.blame.known.answer == "stop if others fail too" and not self.shared
        return self.suspect is not None and not self._leaves

    @property
    def _leaves(self) -> bool:
        """Whether the failure is known to be the fault of its node."""
        return self.blame.known is not None and self.blame.known.answer == "leave"

    @property
    def _stops(self) -> bool:
        """Whether the failure is known to be the script's fault, and no progress was made."""
        known = None if self._leaves else self.blame.known
        return known is not None and (known.answer == "stop" or self.shared)

    def view(self, predecessor_lost: str, now: float) -> RoundView:
        """``predecessor_lost``: why the previous leader was lost, if its round has yet to be ended."""
        lost = next(iter(self.lost.values()), "") or predecessor_lost
        ended, cause = lost or None, "node lost"
        if self.failure and not (self.failure.collateral and lost):
            ended, cause = str(self.failure), self.failure.kind
        return RoundView(
            formed=frozenset(self.formed) - self.lost.keys(),
            lost=frozenset(self.lost),
            succeeded=frozenset(self.succeeded),
            failure=ended,
            cause=cause,
            of_network=self.of_network,
            settling=now < self.settled_at,
            repeated=self.blame.repeated,
            suspect=self.suspect,
            known=self.blame.known.what if self.blame.known and (self._leaves or self._stops) else "",
            since_formed=now - self.formed_at if self.formed else 0.0,
            going=self.going,
            change=self.change,
            since_change=now - self.changed_at,
            drained=self.drained,
        )

    def due_records(self, workers: int, now: float, *, over: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events about the progress of the round that are due, each with its fields. ``over``: the round ends."""
        if fields := self._starts.due(workers, over=over):
            yield "started", fields
        if fields := self._steps.due(now, over=over):
            yield "progress", fields
