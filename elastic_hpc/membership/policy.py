"""The arguments and the result of ``rules.decide``: policy, view and decision; and the verdict on a run. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from elastic_hpc.membership.messages import Failure, Request
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.wishes import Bounds

TERM_GRACE = 20.0
"""Most seconds that workers get to save after SIGTERM: Slurm kills all processes after KillWait, by default 30 s."""

FINISHED = "all workers finished"
"""The reason of a round, and of a job, whose workers all finished."""


class Action(Enum):
    """What the leader does next."""

    WAIT = "wait"
    GATHER = "gather"
    """Stop the round: all workers stop, a new world is formed. Charged to ``--max-restarts``."""
    PROBE = "probe"
    """Have the members of the failed round try to reach each other."""
    DRAIN = "drain"
    """Have the workers save and stop, for a new world that can wait until then."""
    FORM = "form"
    RELEASE = "release"
    """Release nodes that the job cannot use, or that must leave."""
    ABDICATE = "abdicate"
    """Stop leading, without a verdict: others may lead by now."""
    FINISH = "finish"
    REQUEUE = "requeue"
    FAIL = "fail"


@dataclass(frozen=True)
class Policy(Bounds):
    """What the user allows. Times in seconds."""

    spares: int
    """Nodes beyond a full world that wait for a place in the next world."""
    grow: bool
    """Whether further jobs bring more nodes."""
    free_growth: bool
    """A larger world is not charged to ``max_restarts``."""
    grow_every: float
    """Least time between two growths."""
    wait_for_nodes: float
    """How long the job keeps fewer than ``min_nodes`` nodes while more are on their way."""
    max_restarts: int
    max_requeues: int
    heartbeat_timeout: float
    join_timeout: float
    last_call_timeout: float
    grace: float
    """How long workers may take to save and stop after a drain."""
    can_requeue: bool
    learns_hangs: bool = False
    """The leader learns from the job when its workers hang (``hangs``); else their agents detect them, or no one does.
    """
    slow_factor: float = 0.0
    """A node is slow if its steps take this many times as long as the steps of the others (``slow``); 0: no check.
    """
    leaves_slow: bool = False
    """The job leaves slow nodes."""

    def fit(self, nodes: Collection[int]) -> int:
        """The size of the largest world of ``nodes``; 0 if they are too few for a world, or none is the job's own."""
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

    def within(self, bounds: Bounds | None, cap: int | None) -> Policy:
        """This policy with other ``bounds``, if there are any. Under a ``cap`` the job holds at most that many nodes,
        or MIN, and no spares.
        """
        bounds = bounds or Bounds(self.min_nodes, self.max_nodes, self.sizes)
        if cap is None:
            return replace(self, **vars(bounds))
        capped = bounds.capped(cap)
        return replace(self, **vars(capped), spares=max(0, min(self.spares, cap - capped.max_nodes)))


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    cause: str = ""
    """For the verdict, one word or two: ``budget``, ``user``, ``time limit``, ``node lost``, ..."""
    nodes: tuple[int, ...] = ()
    """FORM: the nodes of the new world, in rank order. RELEASE: the nodes that may leave."""
    charged: bool = True
    """Whether a restart or requeue counts against its budget."""
    again: float = float("inf")
    """WAIT: seconds after which to decide again, even if no message has arrived."""
    grows: bool = False
    """DRAIN, and the GATHER that follows: for a larger world."""
    in_place: bool = False
    """DRAIN: nodes of this world are in the next world. Workers that are kept there bring the trained state."""
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
    """The running round (``world.World``). While a round is gathered, the sets are empty."""

    formed: frozenset[int]
    """Nodes of the round that are connected or have finished their part."""
    lost: frozenset[int]
    """Nodes of the round that were lost before they finished."""
    succeeded: frozenset[int]
    failure: str | None
    """What ended the running round, or the round of a lost leader: its first failure, or a loss."""
    cause: str
    """The kind of ``failure``: ``node lost``, or the kind of the worker's failure."""
    of_network: bool
    """The failure may be the network's fault: workers hang, or have lost a peer, and no node is lost."""
    settling: bool
    """The reported failure looks like the echo of another failure, which may still be reported."""
    repeated: bool
    """The job has failed in the same way before, without progress in between."""
    suspect: int | None
    """The only node on which the job fails repeatedly, or the node that is known to be at fault; None if there is no
    such node.
    """
    known: str
    """The known cause of the failure, if a restart on the same nodes cannot help: the fault of ``suspect``, else of the
    script. Empty if no such cause is known.
    """
    since_formed: float
    """0 while no round runs."""
    going: bool
    """The workers have reported a step or, unless they are live, that they listen for a drain."""
    change: Decision | None
    """Why the workers must save and stop for a new world; None if they need not."""
    since_change: float
    drained: bool
    """Some of the workers that succeeded did so because they were asked to save and stop."""


@dataclass(frozen=True)
class NodesView:
    """The nodes whose agents are, or were, connected (``peers.Peers``)."""

    ready: frozenset[int]
    """Live nodes without workers that wait for a place."""
    live: frozenset[int]
    """Connected, and not about to leave."""
    leaving: frozenset[int]
    """Connected, but they must leave."""
    asked: frozenset[int]
    """The nodes of ``leaving`` that must leave on request: that is not charged."""
    returning: frozenset[int]
    """The job's own nodes of ``leaving`` that must be returned to Slurm."""
    staying: frozenset[int]
    """The leader's node and the batch host: they cannot be returned to Slurm."""
    barred: frozenset[int]
    """Connected and the job's own, but workers failed there repeatedly: they vote, but get no workers."""
    idle: frozenset[int]
    """Connected, with no worker alive."""
    preparing: frozenset[int]
    """Ready nodes outside the round whose workers are started before the nodes have a place."""
    paused: frozenset[int]
    """Ready nodes outside the round with workers that have paused, and hold the trained state."""
    since_newcomer: float
    """Since the last of the ready nodes outside the round came; 0 if there is no such node."""
    listens: bool
    """Workers of the round listen for a drain, or a signal has announced a drain to them."""
    absent: int
    """Granted nodes that have never been connected. The leader waits for them at the start only."""
    since_start: float
    since_min: float
    """Since enough nodes have been live; 0 while too few are."""
    below_min: float
    """Since too few nodes have been live; 0 while enough are."""


@dataclass(frozen=True)
class QuorumView:
    """Whether the leader has a majority (``mandate.Mandate``)."""

    quorum: bool
    """Enough members of the last rounds agree (``election``)."""
    since_quorum: float
    without_quorum: float
    """Since the majority was lost; 0 while the leader has a majority."""
    expected: int
    """Members of the round before a take-over that have not been connected since."""
    confirming: bool
    """The leader was frozen, and not all of its agents have answered since."""
    settled: bool
    """Only the members of the running round must agree, and they all know that: no other node is needed for a majority.
    """


@dataclass(frozen=True)
class LinksView:
    """Whether the members of the failed round reach each other (``links.Links``)."""

    probed: bool
    """They have tried, or are trying."""
    probing: float
    """Seconds that are left for their answers; 0 if all have answered, or no probe is running."""
    apart: str
    """Which of them do not reach each other, in a sentence; empty if all do, as far as is known."""
    parts: bool
    """The job continues without some members, so that all others reach each other."""


@dataclass(frozen=True)
class RequestView:
    """The request to the leader (``inputs.Requests``)."""

    request: Request | None
    requested_for: str
    """The reason: ``time limit``, ``preempted``, ``user``, or ``terminated`` (Slurm sent SIGTERM and knows why)."""
    since_request: float


@dataclass(frozen=True)
class StoreView:
    """The store of the next round (``inputs.Stores``)."""

    store_ready: bool
    store_error: str
    """Why the last attempt to start the store failed; empty if none failed."""
    without_store: float
    """Since the store has been needed; 0 when it is ready."""


@dataclass(frozen=True)
class SupplyView:
    """Nodes that are on their way (``inputs.Arrivals``)."""

    starting: int
    """Nodes whose agents are known to be starting."""
    coming: int
    """Nodes that may come: ``starting``, and nodes requested from Slurm."""
    since_growth: float


@dataclass(frozen=True)
class View(RoundView, NodesView, QuorumView, LinksView, RequestView, StoreView, SupplyView):
    """The job as its leader sees it. Nodes are indices in Slurm's order, or joiners' numbers. A field named ``since_``,
    ``below_`` or ``without_`` is a time span in seconds.
    """

    first: bool
    """No round has been formed in this allocation yet."""
    restarts: int
    requeues: int
    shrinks: bool
    """The user or a cap has set other bounds than the submission: the job returns its own nodes beyond them to Slurm.
    """

    @property
    def running(self) -> bool:
        return bool(self.formed or self.lost or self.failure)
