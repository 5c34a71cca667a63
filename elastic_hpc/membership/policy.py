"""What ``rules.decide`` is given, and what it answers: policy, view and decision; and the verdict on a run. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from elastic_hpc.membership.messages import Failure, Request
from elastic_hpc.membership.nodes import votes

TERM_GRACE = 20.0
"""Seconds that workers get at most to save after SIGTERM: Slurm kills all after KillWait, by default 30 s."""

FINISHED = "all workers finished"
"""The reason of a round, and of a job, that came to its end."""


class Action(Enum):
    """What the leader does next."""

    WAIT = "wait"
    GATHER = "gather"
    """Stop the round: all workers stop, a new world is formed. Charged to ``--max-restarts``."""
    DRAIN = "drain"
    """Have the workers save and stop, for a new world that can wait until then."""
    FORM = "form"
    RELEASE = "release"
    """Let nodes go that the job cannot use, or that have to go."""
    ABDICATE = "abdicate"
    """Stop leading, without a verdict: others may lead by now."""
    FINISH = "finish"
    REQUEUE = "requeue"
    FAIL = "fail"


@dataclass(frozen=True)
class Policy:
    """What the user allows. Times in seconds."""

    min_nodes: int
    max_nodes: int
    sizes: tuple[int, ...]
    """The numbers of nodes that a world may have, ascending; empty for all from ``min_nodes`` to ``max_nodes``."""
    spares: int
    """Nodes beside a full world that wait for a place in the next world."""
    grow: bool
    """Whether further jobs bring more nodes."""
    free_growth: bool
    """A larger world is not charged to ``max_restarts``."""
    grow_every: float
    """Least time between two growths."""
    wait_for_nodes: float
    """How long fewer than ``min_nodes`` nodes are kept while more are on their way."""
    max_restarts: int
    max_requeues: int
    heartbeat_timeout: float
    join_timeout: float
    last_call_timeout: float
    grace: float
    """How long workers may take to save and stop after a drain."""
    can_requeue: bool

    def fit(self, nodes: Collection[int]) -> int:
        """The size of the largest world of ``nodes``; 0 if they are too few for any, or none is the job's own."""
        count = len(nodes)
        if not any(map(votes, nodes)):
            return 0
        if not self.sizes:
            return min(count, self.max_nodes) if count >= self.min_nodes else 0
        return max((size for size in self.sizes if size <= count), default=0)

    @property
    def wanted(self) -> int:
        """How many nodes the job may hold."""
        return self.max_nodes + self.spares


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    cause: str = ""
    """For the verdict, one word or two: ``budget``, ``user``, ``time limit``, ``node lost``, ..."""
    nodes: tuple[int, ...] = ()
    """FORM: the nodes of the new world, in rank order. RELEASE: who may go."""
    charged: bool = True
    """Whether a restart or requeue counts against its budget."""
    again: float = float("inf")
    """WAIT: seconds after which to decide again, even if no message has arrived."""
    grows: bool = False
    """DRAIN, and the GATHER that follows: for a larger world."""
    bars: bool = False
    """GATHER and REQUEUE: the node with the failure stays out from now on."""


Outcome = Literal["finished", "failed", "requeue"]


@dataclass(frozen=True)
class Verdict:
    """How this run of the job ends. Written to the run directory before any agent leaves."""

    outcome: Outcome
    cause: str
    reason: str
    failure: Failure | None
    restarts: int
    requeues: int
    round: int


@dataclass(frozen=True)
class RoundView:
    """The round that runs (``world.World``). While a round is gathered, the sets are empty."""

    formed: frozenset[int]
    """Nodes of the round that are in touch or have finished their part."""
    lost: frozenset[int]
    """Nodes of the round that were lost before they finished."""
    succeeded: frozenset[int]
    failure: str | None
    """What ended the round that runs, or the round of a lost leader: its first failure, or a loss."""
    cause: str
    """The kind of ``failure``: ``node lost``, or that of the worker's failure."""
    settling: bool
    """What was reported looks like the echo of another failure, which may still be reported."""
    repeated: bool
    """The job has failed in the same way before, without progress in between."""
    suspect: int | None
    """The node on which alone the job fails again and again; None if there is no such node."""
    since_formed: float
    """0 while no round runs."""
    going: bool
    """The workers have reported a step, or that they listen for a drain."""
    change: Decision | None
    """Why the workers are to save and stop for a new world; None if they are not."""
    since_change: float
    drained: bool
    """Some of the workers that succeeded did so because they were told to save and stop."""


@dataclass(frozen=True)
class NodesView:
    """The nodes whose agents are, or were, in touch (``peers.Peers``)."""

    ready: frozenset[int]
    """Live nodes without workers that wait for a place."""
    live: frozenset[int]
    """In touch, and not about to go."""
    leaving: frozenset[int]
    """In touch, but they have to go."""
    barred: frozenset[int]
    """In touch and the job's own, but workers failed there again and again: they vote, and get no workers."""
    idle: frozenset[int]
    """In touch, with no worker alive."""
    since_newcomer: float
    """Since the last of the ready nodes outside the round came; 0 if there is no such node."""
    listens: bool
    """Workers of the round listen for a drain, or a signal has told them of a drain."""
    absent: int
    """Granted nodes that have never been in touch. The leader waits for them at the start only."""
    since_start: float
    since_min: float
    """Since enough nodes are live; 0 while too few are."""
    below_min: float
    """Since too few nodes are live; 0 while enough are."""


@dataclass(frozen=True)
class QuorumView:
    """Whether the leader has a majority (``mandate.Mandate``)."""

    quorum: bool
    """Enough members of the last rounds agree (``election``)."""
    since_quorum: float
    without_quorum: float
    """Since the majority was lost; 0 while the leader has a majority."""
    expected: int
    """Members of the round before a take-over that have not been in touch since."""
    confirming: bool
    """The leader was frozen, and not all of its agents have answered since."""


@dataclass(frozen=True)
class RequestView:
    """What was requested of the leader (``inputs.Requests``)."""

    request: Request | None
    requested_for: str
    """The reason: ``time limit``, ``preempted``, ``user``, or ``terminated`` (Slurm sent SIGTERM and knows why)."""
    since_request: float


@dataclass(frozen=True)
class StoreView:
    """The store of the next round (``inputs.Stores``)."""

    store_ready: bool
    store_error: str
    """Why the last try to start the store failed; empty if it did not."""
    without_store: float
    """Since the store is needed; 0 when it is ready."""


@dataclass(frozen=True)
class SupplyView:
    """Nodes that are on their way (``inputs.Arrivals``)."""

    starting: int
    """Nodes whose agents are known to be starting."""
    coming: int
    """Nodes that may come: ``starting``, and nodes that Slurm has been asked for."""
    since_growth: float


@dataclass(frozen=True)
class View(RoundView, NodesView, QuorumView, RequestView, StoreView, SupplyView):
    """The job as its leader sees it. Nodes are indices in Slurm's order, or joiners' numbers. A field named ``since_``,
    ``below_`` or ``without_`` is a time span in seconds.
    """

    first: bool
    """No round has been formed in this allocation yet."""
    restarts: int
    requeues: int

    @property
    def running(self) -> bool:
        return bool(self.formed or self.lost or self.failure)
