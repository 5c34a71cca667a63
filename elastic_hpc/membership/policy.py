"""The policy: one pure function from what the leader sees to what happens next, with its reason."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum

from elastic_hpc.membership.messages import Request
from elastic_hpc.membership.nodes import votes


class Action(Enum):
    """What the leader does next."""

    WAIT = "wait"
    GATHER = "gather"
    """Stop the round: all workers stop, a new world is formed. Charged to ``--max-restarts``."""
    DRAIN = "drain"
    """Have the workers save and stop, as a new world is to be formed that need not be formed at once."""
    FORM = "form"
    RELEASE = "release"
    """Let nodes go that are of no use, or that have to go."""
    ABDICATE = "abdicate"
    """Stop leading, without a verdict: others may lead by now."""
    FINISH = "finish"
    REQUEUE = "requeue"
    FAIL = "fail"


TAKE_OVER_WAIT = 0.3
"""How long a new leader that has a majority waits for the other members of the last round, in heartbeat timeouts: they
notice the loss of the old one within a heartbeat, a fifth of the timeout, of each other.
"""

GETS_GOING = 60.0
"""Seconds for which a round whose workers are still starting is not given up for a larger one: the first step after a
fault should come soon. Many scripts do not tell that they have started.
"""

TOGETHER = 1.0
"""Seconds without another newcomer after which those that came join in one round."""

STARTING = 20.0
"""The same, while it is known that the agents of others are just starting."""


STORE_PATIENCE = 120.0
"""Seconds for which a round waits for its store, which is tried again and again. A name server that does not answer
keeps it from opening for up to a minute.
"""

HEARING = 3.0
"""Seconds in which workers that ask whether they are to stop have done so, in a round that has just been formed too."""


TERM_GRACE = 20.0
"""Seconds that workers get at most to save after SIGTERM: Slurm kills all after KillWait, by default 30 s."""


FINISHED = "all workers finished"
"""The reason of a round, and of a job, that came to its end."""


@dataclass(frozen=True)
class Policy:
    """What the user allows. Times in seconds."""

    min_nodes: int
    max_nodes: int
    sizes: tuple[int, ...]
    """The numbers of nodes that a world may have, ascending; empty for all between the two."""
    spares: int
    """Nodes beside a full world that wait for their turn."""
    grow: bool
    """Whether further jobs bring more nodes."""
    free_growth: bool
    """A larger world is not charged to ``max_restarts``."""
    grow_every: float
    """So long there is between two growths, at least."""
    wait_for_nodes: float
    """How long fewer than MIN nodes are kept, when more are on their way."""
    max_restarts: int
    max_requeues: int
    heartbeat_timeout: float
    join_timeout: float
    last_call_timeout: float
    grace: float
    """How long workers may take to save and stop, when they are asked to."""
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
class View:
    """A frozen picture of the job, as the leader sees it. Nodes are indices in Slurm's order, or joiners' numbers."""

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
    """In touch, and not about to go."""
    leaving: frozenset[int]
    """In touch, but they have to go."""
    idle: frozenset[int]
    """In touch, with no worker alive."""
    since_newcomer: float
    """Seconds since the last one of those that are ready but not in the round came; 0 for none."""
    starting: int
    """Nodes whose agents are known to be starting."""
    coming: int
    """Nodes that may come: ``starting``, and those that Slurm has been asked for."""
    since_growth: float
    since_formed: float
    """Seconds since the round that runs was formed; 0 for none."""
    going: bool
    """Its workers have reported a step, or have begun to listen."""
    listens: bool
    """Workers of the round ask whether they are to save and stop, or were told so by a signal."""
    change: Decision | None
    """Why they were asked to, for a new world; None if they were not."""
    since_change: float
    absent: int
    """Granted nodes that have never been heard of. They are waited for at the start only."""
    first: bool
    """No round has been formed in this allocation yet."""
    since_start: float
    since_min: float
    """Seconds since enough nodes are live; 0 while they are not."""
    below_min: float
    """Seconds since too few nodes are live; 0 while enough are."""
    quorum: bool
    """Enough members of the last rounds are live to decide (``elastic_hpc.membership.election``)."""
    without_quorum: float
    """Seconds since it is lost; 0 while it holds."""
    expected: int
    """Members of the round before a take-over that have not been heard of since."""
    since_quorum: float
    store_ready: bool
    store_error: str
    """What kept the store from opening the last time; empty while nothing did."""
    without_store: float
    """Seconds since it is wanted; 0 when it is there."""
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
    """FORM: the nodes of the new world, in rank order. RELEASE: who may go."""
    charged: bool = True
    """Whether a restart or requeue counts against its budget."""
    again: float = float("inf")
    """WAIT: seconds after which there may be more to say, though nothing has arrived."""
    grows: bool = False
    """DRAIN, and the GATHER that follows: because there may be a larger world."""


def decide(view: View, policy: Policy) -> Decision:
    """What happens next, and why. First match wins; the order is the policy."""
    if not view.quorum:
        if view.without_quorum < policy.heartbeat_timeout and not (view.formed or view.lost):
            return Decision(Action.WAIT, "fewer than half of the last round's nodes are in touch")
        return Decision(Action.ABDICATE, "fewer than half of the last round's nodes are in touch")
    if view.request == "stop":
        if view.requested_for == "user":
            return Decision(Action.FAIL, "stopped by the user", "user")
        return Decision(Action.FAIL, f"stopped by a worker: {view.requested_for}", "stopped")
    if _is_done(view) and not view.drained:
        return Decision(Action.FINISH, FINISHED)
    if view.request and not _still_draining(view, policy):
        return _drained(view, policy)
    if going := _released(view, policy):
        return going
    return _while_running(view, policy) if view.running else _while_gathering(view, policy)


def _is_done(view: View) -> bool:
    return bool(view.formed) and view.formed <= view.succeeded and not view.lost


def _released(view: View, policy: Policy) -> Decision | None:
    """Nodes that the job holds for nothing. Its own are not given back: Slurm could not use them."""
    if go := view.leaving & view.idle - view.formed:
        return Decision(Action.RELEASE, "its job ends", nodes=tuple(go))
    free = sorted(node for node in view.ready - view.formed if not votes(node))
    excess = len(view.live | view.formed) - policy.wanted
    if view.running and not _may_grow(view, policy):
        return Decision(Action.RELEASE, "no restart is left to take it in", nodes=tuple(free)) if free else None
    if free and excess > 0:
        return Decision(Action.RELEASE, "the job has all nodes that it may use", nodes=tuple(free[-excess:]))
    return None


def _may_grow(view: View, policy: Policy) -> bool:
    return policy.free_growth or view.restarts < policy.max_restarts


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
        return _restart(Decision(Action.GATHER, why), view, policy)
    if _is_done(view):
        why = "the workers saved and stopped, as a signal or a worker had told them to"
        return _restart(view.change or Decision(Action.GATHER, why), view, policy)
    if view.change:
        return _while_changing(view, view.change, policy)
    if view.succeeded or view.request:
        return Decision(Action.WAIT, "training")
    return _change(view, policy)


def _restart(decision: Decision, view: View, policy: Policy) -> Decision:
    """``decision`` carried out now, if the budget allows it."""
    if decision.charged and view.restarts >= policy.max_restarts:
        why = f"{decision.reason}; all {policy.max_restarts} restarts (--max-restarts) are used up"
        return Decision(Action.FAIL, why, "budget")
    return replace(decision, action=Action.GATHER)


def _change(view: View, policy: Policy) -> Decision:
    """A new world that is formed although the one that trains could go on."""
    if (go := view.leaving & view.formed) and view.restarts < policy.max_restarts:
        return Decision(Action.DRAIN, f"{len(go)} node(s) have to go")
    newcomers = view.ready - view.formed
    if not newcomers or policy.fit(view.live) <= len(view.formed):
        return Decision(Action.WAIT, "training")
    if not _may_grow(view, policy):
        return Decision(Action.WAIT, "a node is ready to join, but no restart is left to take it in")
    if not view.going and view.since_formed < GETS_GOING:
        return Decision(Action.WAIT, "a node is ready to join, when a step has been done")
    if view.since_growth < policy.grow_every:
        return Decision(Action.WAIT, f"a node is ready to join, {policy.grow_every:g} s after the last (--grow-every)")
    together = STARTING if view.starting else TOGETHER
    if view.since_newcomer < together:
        why = "a node is ready to join; others may follow"
        return Decision(Action.WAIT, why, again=together - view.since_newcomer)
    return Decision(Action.DRAIN, f"{len(newcomers)} more node(s) joined", charged=not policy.free_growth, grows=True)


def _while_changing(view: View, change: Decision, policy: Policy) -> Decision:
    grace = policy.grace if view.listens else min(policy.grace, HEARING)
    if view.since_change < grace:
        return Decision(Action.WAIT, "the workers save and stop", again=grace - view.since_change)
    return _restart(change, view, policy)


def _while_gathering(view: View, policy: Policy) -> Decision:
    size = policy.fit(view.live)
    patience = TAKE_OVER_WAIT * policy.heartbeat_timeout
    if view.expected and view.since_quorum < patience:
        why = f"{view.expected} node(s) of the last round have not come yet"
        return Decision(Action.WAIT, why, again=patience - view.since_quorum)
    if not size:
        return _while_too_few(view, policy)
    if view.first and view.absent and view.since_min < policy.last_call_timeout:
        why = f"waiting for {view.absent} more granted node(s)"
        return Decision(Action.WAIT, why, again=policy.last_call_timeout - view.since_min)
    if view.ready != view.live or view.leaving - view.idle:
        return Decision(Action.WAIT, "workers of the last round are being stopped")
    if not view.store_ready:
        return _without_store(view, policy)
    return Decision(Action.FORM, f"{size} nodes are ready", nodes=tuple(sorted(view.ready)[:size]))


def _without_store(view: View, policy: Policy) -> Decision:
    """On other nodes, after a requeue, it may open."""
    if view.without_store < STORE_PATIENCE:
        so_far = f", so far in vain: {view.store_error}" if view.store_error else ""
        left = STORE_PATIENCE - view.without_store
        return Decision(Action.WAIT, f"the store of the next round is being opened{so_far}", again=left)
    why = view.store_error or "nothing was heard of it"
    why = f"the store of the next round could not be opened within {STORE_PATIENCE:g} s: {why}"
    return give_back(why, view.requeues, policy, "store")


def _while_too_few(view: View, policy: Policy) -> Decision:
    least = policy.sizes[0] if policy.sizes else policy.min_nodes
    if view.first:
        waited, patience = view.since_start, policy.join_timeout
    else:
        waited, patience = view.below_min, policy.heartbeat_timeout
        if view.coming:
            patience = max(patience, policy.wait_for_nodes)
    if waited < patience:
        more = f", {view.coming} on the way" if view.coming else ""
        return Decision(Action.WAIT, f"{len(view.live)} of at least {least} nodes are here{more}")
    return give_back(f"{len(view.live)} nodes are left, fewer than MIN {least}", view.requeues, policy)


def give_back(why: str, requeues: int, policy: Policy, cause: str = "node lost") -> Decision:
    """The allocation is of no use any more: requeue, or the end."""
    if not policy.can_requeue:
        return Decision(Action.FAIL, f"{why}; this job cannot be requeued", cause)
    if requeues >= policy.max_requeues:
        return Decision(
            Action.FAIL, f"{why}; all {policy.max_requeues} requeues (--max-requeues) are used up", "budget"
        )
    return Decision(Action.REQUEUE, why, cause)
