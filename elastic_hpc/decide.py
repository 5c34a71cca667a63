"""The policy: one pure function from what the leader sees to what happens next, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """What the leader does next."""

    WAIT = "wait"
    GATHER = "gather"
    """Stop the round: all workers stop, a new world is formed. Charged to ``--max-restarts``."""
    FORM = "form"
    FINISH = "finish"
    REQUEUE = "requeue"
    FAIL = "fail"


@dataclass(frozen=True)
class Policy:
    """What the user allows. Times in seconds."""

    min_nodes: int
    max_nodes: int
    max_restarts: int
    max_requeues: int
    heartbeat_timeout: float
    join_timeout: float
    last_call_timeout: float
    can_requeue: bool


@dataclass(frozen=True)
class View:
    """A frozen picture of the job, as the leader sees it. Nodes are indices in Slurm's order."""

    formed: frozenset[int]
    """Nodes of the running round that are still there or have finished their part; empty while a round is gathered."""
    lost: frozenset[int]
    """Nodes of the running round that are gone before they finished."""
    succeeded: frozenset[int]
    failure: str | None
    """First failure that was reported in the running round."""
    ready: frozenset[int]
    """Live nodes that wait for a place with no worker alive."""
    live: frozenset[int]
    absent: int
    """Granted nodes that have never been heard of. They are waited for at the start only."""
    first: bool
    """No round has been formed in this allocation yet."""
    since_start: float
    since_min: float
    """Seconds since at least MIN nodes are live; 0 while they are not."""
    below_min: float
    """Seconds since fewer than MIN nodes are live; 0 while enough are."""
    store_ready: bool
    restarts: int
    requeues: int
    request: str | None
    """``drain`` or ``stop`` when somebody asked for it."""

    @property
    def running(self) -> bool:
        return bool(self.formed or self.lost)


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    nodes: tuple[int, ...] = ()
    """FORM: the nodes of the new world, in rank order."""
    charged: bool = True
    """Whether a restart or requeue counts against its budget."""


def decide(view: View, policy: Policy) -> Decision:
    """What happens next, and why. First match wins; the order is the policy."""
    if view.request == "stop":
        return Decision(Action.FAIL, "stopped by the user")
    if view.running and view.formed <= view.succeeded and not view.lost:
        return Decision(Action.FINISH, "all workers finished")
    if view.request == "drain":
        if policy.can_requeue:
            return Decision(Action.REQUEUE, "warned by Slurm: time limit or preemption", charged=False)
        return Decision(Action.FAIL, "warned by Slurm: time limit or preemption; this job cannot be requeued")
    return _while_running(view, policy) if view.running else _while_gathering(view, policy)


def _while_running(view: View, policy: Policy) -> Decision:
    if view.failure or view.lost:
        why = view.failure or f"{len(view.lost)} of {len(view.formed) + len(view.lost)} nodes lost"
        if view.restarts >= policy.max_restarts:
            return Decision(Action.FAIL, f"{why}; all {policy.max_restarts} restarts (--max-restarts) are used up")
        return Decision(Action.GATHER, why)
    newcomers = view.ready - view.formed
    if newcomers and len(view.formed) < policy.max_nodes and not view.succeeded:
        if view.restarts >= policy.max_restarts:
            return Decision(Action.WAIT, "a node is ready to join, but no restart is left to take it in")
        return Decision(Action.GATHER, f"{len(newcomers)} more node(s) joined")
    return Decision(Action.WAIT, "training")


def _while_gathering(view: View, policy: Policy) -> Decision:
    enough = len(view.live) >= policy.min_nodes
    if not enough:
        patience = policy.join_timeout if view.first else policy.heartbeat_timeout
        waited = view.since_start if view.first else view.below_min
        if waited < patience:
            return Decision(Action.WAIT, f"{len(view.live)} of at least {policy.min_nodes} nodes are here")
        return _give_back(view, policy, f"{len(view.live)} nodes are left, fewer than MIN {policy.min_nodes}")
    if view.first and view.absent and view.since_min < policy.last_call_timeout:
        return Decision(Action.WAIT, f"{view.absent} granted node(s) have not joined yet")
    if view.ready != view.live:
        return Decision(Action.WAIT, "workers of the last round are being stopped")
    if not view.store_ready:
        return Decision(Action.WAIT, "the store of the next round is being opened")
    nodes = tuple(sorted(view.ready)[: policy.max_nodes])
    return Decision(Action.FORM, f"{len(nodes)} nodes are ready", nodes)


def _give_back(view: View, policy: Policy, why: str) -> Decision:
    if not policy.can_requeue:
        return Decision(Action.FAIL, f"{why}; this job cannot be requeued")
    if view.requeues >= policy.max_requeues:
        return Decision(Action.FAIL, f"{why}; all {policy.max_requeues} requeues (--max-requeues) are used up")
    return Decision(Action.REQUEUE, why)
