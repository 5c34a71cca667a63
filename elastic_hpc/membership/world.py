"""The round that runs, as its leader sees it: its nodes, what went wrong first, and how far its workers are. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from elastic_hpc.membership.causes import blames_machine, signature
from elastic_hpc.membership.messages import Failure, Plan, Status
from elastic_hpc.membership.policy import Decision, RoundView
from elastic_hpc.membership.strikes import Strike

SETTLE = 0.25
"""Seconds in which the cause of a failure may still be reported, when its echo was faster."""

OTHERS = 2.0
"""Seconds in which other nodes may still fail in the same way, before a node is blamed for a failure."""

_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})

IN_A_ROW = 3
"""Number of failures in a row after which their node is blamed: of any kind, if there is no progress in between; else
if the last one looks like the machine's.
"""

RECORD_EVERY = 10.0
"""Seconds between two entries in the record of how far the workers are."""

ALIVE_IS_PROGRESS = 60.0
"""Seconds after which a round has made progress, if its workers report no steps."""


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
        if status.warm + status.cold:
            self._by_node[status.node] = status

    def due(self, workers: int, *, over: bool) -> dict[str, Any]:
        """What to record now, if anything. ``workers``: their number in the round. ``over``: the round ends."""
        reported = self._by_node.values()
        warm, cold = sum(status.warm for status in reported), sum(status.cold for status in reported)
        if self._recorded or not reported or (warm + cold < workers and not over):
            return {}
        self._recorded = True
        why = sorted({status.cold_why for status in reported if status.cold})
        return {"warm": warm, "cold": cold, "why": why, "standby_mb": max(status.standby_mb for status in reported)}


@dataclass(frozen=True)
class Blame:
    """What is known of a failure from the failures before it."""

    repeated: bool = False
    """The job has failed in the same way before, without progress in between."""
    node: bool = False
    """On this node alone the job fails again and again."""


NOBODY = Blame()


@dataclass
class World:
    """The round that runs; empty while a round is gathered. Nodes are numbers, times are on the leader's clock."""

    formed: tuple[int, ...] = ()
    """The nodes, in rank order."""
    plans: dict[int, Plan] = field(default_factory=dict)
    formed_at: float = 0.0
    lost: dict[int, str] = field(default_factory=dict)
    """Nodes that were lost before they finished, and why."""
    succeeded: set[int] = field(default_factory=set)
    drained: bool = False
    failure: Failure | None = None
    """The first failure that is no echo of another failure; an echo, until the cause is reported."""
    failed_at: float = 0.0
    going: bool = False
    """The workers have reported a step, or that they listen for a drain."""
    blame: Blame = NOBODY
    """Whether this failure is known from before."""
    suspect: int | None = None
    """The node that is to blame; None if that is not a node."""
    change: Decision | None = None
    """Why the workers were told to save and stop for a new world."""
    changed_at: float = 0.0
    _steps: StepReport = field(default_factory=StepReport)
    _starts: StartReport = field(default_factory=StartReport)

    def on_status(self, status: Status) -> None:
        """A node of the round has reported."""
        self._steps.update(status, rank0=status.node == self.formed[0])
        self._starts.update(status)
        self.going = self.going or status.step >= 0 or status.listens

    def on_success(self, status: Status) -> None:
        self.succeeded.add(status.node)
        self.drained = self.drained or status.drained

    def on_failure(self, failure: Failure, now: float) -> bool:
        """Whether ``failure`` is the cause, as far as is known: no failure was known before, or only an echo."""
        if self.failure is None:
            self.failed_at = now
        elif failure.collateral or not self.failure.collateral:
            return False
        self.failure = failure
        return True

    def on_blame(self, blame: Blame, node: int, now: float) -> None:
        """``blame``: for the failure that was last taken for the cause, on ``node``."""
        self.blame, self.suspect = blame, node if blame.node else None
        if blame.node:
            self.failed_at = now

    def on_same_failure(self) -> None:
        """Another node has failed in the same way, so no node is to blame."""
        self.suspect = None

    @property
    def settled_at(self) -> float:
        """Until when more is to be learned of the failure."""
        if self.failure and self.failure.collateral:
            return self.failed_at + SETTLE
        return self.failed_at + OTHERS if self.suspect is not None else 0.0

    def view(self, predecessor_lost: str, now: float) -> RoundView:
        """``predecessor_lost``: why the leader before was lost, if its round has yet to be ended."""
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
            settling=now < self.settled_at,
            repeated=self.blame.repeated,
            suspect=self.suspect,
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


class FailureHistory:
    """Whether the job makes progress from one failure to the next, and if not, whether its script or a node is to
    blame: what fails on different nodes is the script, what fails on one node alone is that node. A machine that fails
    every hour is to blame too, though its workers make progress in between.
    """

    def __init__(self, strikes: Iterable[Strike] = ()) -> None:
        """``strikes``: those of the runs before, as a node that was left out for a failure may have been innocent."""
        before = [strike for strike in strikes if strike.signature]
        self.step = -1
        """Last training step that a worker reported; -1 for none."""
        self.last_failure: Failure | None = None
        self._failed = [(strike.signature, strike.node) for strike in before]
        """Signature and node of the failures since the last progress; the signature of a crash is empty."""
        self._nodes: list[str] = []
        """Nodes of the last failures, whatever progress there was in between."""
        self._failed_at_step = max((strike.step for strike in before), default=-1)

    def judge(self, failure: Failure, alive: float, *, alone: bool) -> Blame:
        """A round that lived for ``alive`` seconds has failed. An echo does not count, nor does what comes from
        outside, as most signals do; two crashes alike need not be the same failure. A hang is everybody's. A node that
        is ``alone`` in its round cannot be compared with others: it is to blame only for what scripts rarely do.
        """
        is_from_outside = failure.kind == "signal" and -failure.exitcode not in _CRASHES
        if failure.collateral or failure.kind == "stopped" or is_from_outside:
            return NOBODY
        if self.step > self._failed_at_step if self.step >= 0 else alive > ALIVE_IS_PROGRESS:
            self._failed.clear()
        node, mark = failure.node, self._signature(failure)
        nodes = {other for before, other in self._failed if before == mark} if mark else set()
        in_a_row = [other for _, other in self._failed[1 - IN_A_ROW :]] == [node] * (IN_A_ROW - 1)
        self._failed.append((mark, node))
        self._failed_at_step = self.step
        on_node = nodes == {node} or (in_a_row and nodes <= {node})
        self._nodes = [*self._nodes, node][-IN_A_ROW:]
        is_machines = blames_machine(failure.message)
        comparable = failure.kind != "hang" and (not alone or is_machines)
        is_broken = is_machines and nodes <= {node} and self._nodes == [node] * IN_A_ROW
        return Blame(repeated=bool(nodes), node=comparable and (on_node or is_broken))

    def is_same(self, failure: Failure, other: Failure) -> bool:
        """Whether another node has failed by itself in the same way."""
        return (
            not failure.collateral
            and failure.node != other.node
            and signature(failure.kind, failure.message, failure.node)
            == signature(other.kind, other.message, other.node)
        )

    def strike(self, failure: Failure) -> dict[str, Any]:
        """What a ``Strike`` for ``failure`` has to hold, besides the node and the reason."""
        return {"signature": self._signature(failure), "step": self._failed_at_step}

    def on_end(self, failure: Failure | None) -> None:
        """A round ended; ``failure`` is None if no worker failed."""
        self.last_failure = failure or self.last_failure
        if failure is None:
            self._failed.clear()

    @staticmethod
    def _signature(failure: Failure) -> str:
        return "" if failure.kind == "signal" else signature(failure.kind, failure.message, failure.node)
