"""The policy: one pure function from what the leader sees to what happens next, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic_hpc.protocol import Request


class Action(Enum):
    """What the leader does next."""

    WAIT = "wait"
    GATHER = "gather"
    """Stop the round: all workers stop, a new world is formed. Charged to ``--max-restarts``."""
    FORM = "form"
    ABDICATE = "abdicate"
    """Stop leading, without a verdict: others may lead by now."""
    FINISH = "finish"
    REQUEUE = "requeue"
    FAIL = "fail"


TAKE_OVER_WAIT = 0.3
"""How long a new leader that has a majority waits for the other members of the last round, in heartbeat timeouts: they
notice the loss of the old one within a heartbeat, a fifth of the timeout, of each other.
"""


TERM_GRACE = 20.0
"""Seconds that workers get at most to save after SIGTERM: Slurm kills all after KillWait, by default 30 s."""


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
    grace: float
    """How long workers may take to save and stop, when they are asked to."""
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
    """What ended the round that runs, or that was left by a lost leader: first failure, or loss."""
    cause: str
    """Its kind: ``node lost``, or that of the failure."""
    settling: bool
    """What was reported is an echo of something else, which may still be reported."""
    repeated: bool
    """The round before ended with the same failure, and no step was done in between."""
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
    quorum: bool
    """Enough members of the last rounds are live to decide (``elastic_hpc.election``)."""
    without_quorum: float
    """Seconds since it is lost; 0 while it holds."""
    expected: int
    """Members of the round before a take-over that have not been heard of since."""
    since_quorum: float
    store_ready: bool
    restarts: int
    requeues: int
    request: Request | None
    requested_for: str
    """Why: ``time limit``, ``preempted``, ``user``, or ``terminated``: Slurm sent SIGTERM, it knows why."""
    since_request: float
    drained: bool
    """Some of the workers that succeeded did so because they were asked to save and stop."""

    @property
    def running(self) -> bool:
        return bool(self.formed or self.lost or self.failure)


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    cause: str = ""
    """For the verdict, one word or two: ``budget``, ``user``, ``time limit``, ``node lost``, ..."""
    nodes: tuple[int, ...] = ()
    """FORM: the nodes of the new world, in rank order."""
    charged: bool = True
    """Whether a restart or requeue counts against its budget."""


def decide(view: View, policy: Policy) -> Decision:
    """What happens next, and why. First match wins; the order is the policy."""
    if not view.quorum:
        if view.without_quorum < policy.heartbeat_timeout and not (view.formed or view.lost):
            return Decision(Action.WAIT, "fewer than half of the last round's nodes are in touch")
        return Decision(Action.ABDICATE, "fewer than half of the last round's nodes are in touch")
    if view.request == "stop":
        return Decision(Action.FAIL, "stopped by the user", "user")
    if view.formed and view.formed <= view.succeeded and not view.lost and not (view.request and view.drained):
        return Decision(Action.FINISH, "all workers finished")
    if view.request and not _still_draining(view, policy):
        return _drained(view, policy)
    return _while_running(view, policy) if view.running else _while_gathering(view, policy)


def _still_draining(view: View, policy: Policy) -> bool:
    whole = bool(view.formed) and not view.lost and not view.failure
    return whole and not view.formed <= view.succeeded and view.since_request < _grace(view, policy)


def _grace(view: View, policy: Policy) -> float:
    """After SIGTERM Slurm kills all processes soon."""
    return min(policy.grace, TERM_GRACE) if view.requested_for == "terminated" else policy.grace


def _drained(view: View, policy: Policy) -> Decision:
    if view.formed and view.formed <= view.succeeded:
        how = "the workers saved and stopped"
    elif view.failure or view.lost:
        how = f"while they were saving: {view.failure}"
    elif view.running:
        how = f"the workers did not stop within {_grace(view, policy):g} s (--grace)"
    else:
        how = "no worker ran"
    if view.request == "save-and-stop":
        return Decision(Action.FAIL, f"stopped by the user; {how}", "user")
    why = f"{view.requested_for}: {how}"
    if policy.can_requeue:
        return Decision(Action.REQUEUE, why, view.requested_for, charged=False)
    return Decision(Action.FAIL, f"{why}; this job cannot be requeued", view.requested_for)


def _while_running(view: View, policy: Policy) -> Decision:
    if view.failure or view.lost:
        why = view.failure or f"{len(view.lost)} of {len(view.formed) + len(view.lost)} nodes lost"
        if view.settling and not view.lost:
            return Decision(Action.WAIT, f"looking for the cause of: {why}")
        if view.repeated:
            return Decision(Action.FAIL, f"{why}; the same failure as before, without progress in between", view.cause)
        if view.restarts >= policy.max_restarts:
            return Decision(
                Action.FAIL, f"{why}; all {policy.max_restarts} restarts (--max-restarts) are used up", "budget"
            )
        return Decision(Action.GATHER, why)
    newcomers = view.ready - view.formed
    if newcomers and len(view.formed) < policy.max_nodes and not view.succeeded and not view.request:
        if view.restarts >= policy.max_restarts:
            return Decision(Action.WAIT, "a node is ready to join, but no restart is left to take it in")
        return Decision(Action.GATHER, f"{len(newcomers)} more node(s) joined")
    return Decision(Action.WAIT, "training")


def _while_gathering(view: View, policy: Policy) -> Decision:
    enough = len(view.live) >= policy.min_nodes
    if view.expected and view.since_quorum < TAKE_OVER_WAIT * policy.heartbeat_timeout:
        return Decision(Action.WAIT, f"{view.expected} node(s) of the last round have not come yet")
    if not enough:
        patience = policy.join_timeout if view.first else policy.heartbeat_timeout
        waited = view.since_start if view.first else view.below_min
        if waited < patience:
            return Decision(Action.WAIT, f"{len(view.live)} of at least {policy.min_nodes} nodes are here")
        return give_back(f"{len(view.live)} nodes are left, fewer than MIN {policy.min_nodes}", view.requeues, policy)
    if view.first and view.absent and view.since_min < policy.last_call_timeout:
        return Decision(Action.WAIT, f"{view.absent} granted node(s) have not joined yet")
    if view.ready != view.live:
        return Decision(Action.WAIT, "workers of the last round are being stopped")
    if not view.store_ready:
        return Decision(Action.WAIT, "the store of the next round is being opened")
    nodes = tuple(sorted(view.ready)[: policy.max_nodes])
    return Decision(Action.FORM, f"{len(nodes)} nodes are ready", nodes=nodes)


def give_back(why: str, requeues: int, policy: Policy) -> Decision:
    """The allocation is of no use any more: requeue, or the end."""
    if not policy.can_requeue:
        return Decision(Action.FAIL, f"{why}; this job cannot be requeued", "node lost")
    if requeues >= policy.max_requeues:
        return Decision(
            Action.FAIL, f"{why}; all {policy.max_requeues} requeues (--max-requeues) are used up", "budget"
        )
    return Decision(Action.REQUEUE, why, "node lost")
