"""The rules: ``decide``, a pure function from what the leader sees to what happens next, with the reason."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.policy import FINISHED, TERM_GRACE, Action, Decision, Policy, View

TAKE_OVER_WAIT = 0.3
"""How many heartbeat timeouts a new leader that has a majority waits for the other members of the last round. The
members notice the loss of the old leader within one heartbeat, a fifth of the timeout, of each other.
"""

FIRST_STEP_TIMEOUT = 60.0
"""Seconds for which a round whose workers are still starting is not stopped for a larger world: the first step after a
fault should come soon. Many scripts do not report that they have started.
"""

NEWCOMER_QUIET = 1.0
"""Seconds without another newcomer after which the newcomers are taken into a new round together."""

NEWCOMER_QUIET_STARTING = 20.0
"""As NEWCOMER_QUIET, while the agents of further nodes are known to be starting."""

SCRIPTS = "a restart cannot fix that"
"""Part of the reason of a job that failed through a fault of its script."""

STORE_TIMEOUT = 120.0
"""Seconds for which a round waits for its store, whose start is tried repeatedly. A name server that does not
answer delays a start by up to a minute.
"""

STRAGGLER_SHARE = 0.3
"""How long a start with too few nodes continues after the last agent has come, as a share of ``join_timeout``. All
agents start at the same moment: the agent of a node that is silent for this long will not start, and other nodes may be
free.
"""

LISTEN_TIMEOUT = 3.0
"""Seconds after a drain in which workers of a round that was just formed may still report that they listen for it. If
no worker has reported this by then, the workers are stopped without a checkpoint.
"""


def decide(view: View, policy: Policy) -> Decision:
    """What happens next, and why. The first rule that matches decides."""
    if not view.quorum:
        if view.without_quorum < policy.heartbeat_timeout and (view.confirming or not (view.formed or view.lost)):
            return Decision(Action.WAIT, "fewer than half of the last round's nodes are connected")
        return Decision(Action.ABDICATE, "fewer than half of the last round's nodes are connected")
    if view.request == "stop":
        if view.requested_for == "user":
            return Decision(Action.FAIL, "stopped by the user", "user")
        return Decision(Action.FAIL, f"stopped by a worker: {view.requested_for}", "stopped")
    if _is_done(view) and not view.drained:
        return Decision(Action.FINISH, FINISHED)
    if view.request and not _still_draining(view, policy):
        return _drained(view, policy)
    if release := _released(view, policy):
        return release
    return _while_running(view, policy) if view.running else _while_gathering(view, policy)


def _is_done(view: View) -> bool:
    return bool(view.formed) and view.formed <= view.succeeded and not view.lost


def _released(view: View, policy: Policy) -> Decision | None:
    """Release nodes that must leave, and nodes beyond those that the job may have. The job's own nodes are released
    only while a round runs whose members need no agreement of others, and only if they must be returned to Slurm.
    """
    own = (view.returning | view.live) - view.staying if view.settled else frozenset[int]()
    outside = view.idle - view.formed
    if leaving := frozenset(node for node in view.leaving & outside if not votes(node) or node in view.returning & own):
        return Decision(Action.RELEASE, "its job ends", nodes=tuple(leaving))
    joiners = tuple(sorted(node for node in view.ready - view.formed if not votes(node)))
    if view.running and not _may_grow(view, policy) and joiners:
        return Decision(Action.RELEASE, "no restart is left for another node to join (--max-restarts)", nodes=joiners)
    going = surplus((view.live | view.formed) - view.leaving, view.staying | view.formed, policy)
    free = tuple(node for node in going if node in view.ready)
    free = tuple(node for node in free if not votes(node) or (view.shrinks and node in own))
    if free:
        return Decision(Action.RELEASE, "the job has all nodes that it may use", nodes=free)
    return None


def surplus(held: frozenset[int], staying: Collection[int], policy: Policy) -> tuple[int, ...]:
    """The nodes of ``held`` beyond those that the job may hold, in the order in which they leave: joiners, the newest
    first, then own nodes from the highest number. ``staying`` cannot leave.
    """
    excess = max(0, len(held) - policy.wanted)
    return tuple(sorted(held.difference(staying), reverse=True)[:excess])


def _may_grow(view: View, policy: Policy) -> bool:
    return policy.free_growth or view.restarts < policy.max_restarts


def _still_draining(view: View, policy: Policy) -> bool:
    if not view.running and view.paused:  # they save when they have formed a world
        return view.since_request < _grace(view, policy)
    whole = bool(view.formed) and not view.lost and not view.failure
    return whole and not view.formed <= view.succeeded and view.since_request < _grace(view, policy)


def _grace(view: View, policy: Policy) -> float:
    """Seconds that the workers have to save: fewer after SIGTERM, as Slurm soon kills all processes."""
    return min(policy.grace, TERM_GRACE) if view.requested_for == "terminated" else policy.grace


def _drained(view: View, policy: Policy) -> Decision:
    if view.formed and view.formed <= view.succeeded:
        how = "the workers saved and stopped"
    elif view.failure or view.lost:
        how = f"while the workers were saving: {view.failure}"
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
        if view.of_network and (decision := _after_probe(why, view, policy)):
            return decision
        why = f"{why}; {view.apart}" if view.apart else why
        if view.suspect is not None and (decision := _without_suspect(why, view, policy)):
            return decision
        if view.known and view.suspect is None:
            return Decision(Action.FAIL, f"{why}; {SCRIPTS}, and no progress was made: {view.known}", view.cause)
        if view.repeated:
            return Decision(Action.FAIL, f"{why}; the same failure as before, without progress in between", view.cause)
        return _restart(Decision(Action.GATHER, why), view, policy)
    if _is_done(view):
        why = "the workers saved and stopped at the request of a signal or a worker"
        return _restart(view.change or Decision(Action.GATHER, why), view, policy)
    if view.change:
        return _while_changing(view, view.change, policy)
    if view.succeeded or view.request:
        return Decision(Action.WAIT, "training")
    return _change(view, policy)


def _after_probe(why: str, view: View, policy: Policy) -> Decision | None:
    """The decision that follows from whether the members of the round reach each other; None if nothing follows."""
    if not view.probed:
        return Decision(Action.PROBE, f"checking the connections between the nodes: {why}")
    if view.probing:
        return Decision(Action.WAIT, f"checking the connections between the nodes: {why}", again=view.probing)
    why = f"{why}; {view.apart}"
    if view.parts:
        return _restart(Decision(Action.GATHER, why), view, policy)
    if view.apart and view.repeated:
        return requeue_or_fail(why, view.requeues, policy, view.cause)
    return None


def _without_suspect(why: str, view: View, policy: Policy) -> Decision | None:
    """Continue without the node that fails repeatedly, here or after a requeue; None if that cannot help."""
    same, between = ("the same failure", ", without progress in between") if view.repeated else ("failures", "")
    what = f"the fault of that node: {view.known}" if view.known else f"{same} on the same node repeatedly{between}"
    why = f"{why}; {what}"
    if policy.fit(view.live - {view.suspect}) or view.coming or policy.grow:
        return _restart(Decision(Action.GATHER, why, bars=True), view, policy)
    if view.repeated:
        decision = requeue_or_fail(why, view.requeues, policy, view.cause)
        return replace(decision, bars=decision.action is Action.REQUEUE)
    return None


def _restart(decision: Decision, view: View, policy: Policy) -> Decision:
    """Stop the round now, for the reason of ``decision``; fail if the budget is used up."""
    if decision.charged and view.restarts >= policy.max_restarts:
        why = f"{decision.reason}; all {policy.max_restarts} restarts (--max-restarts) are used up"
        return Decision(Action.FAIL, why, "budget")
    return replace(decision, action=Action.GATHER)


def _change(view: View, policy: Policy) -> Decision:
    """A change of a world that trains and could continue: a node must leave, or a larger world is possible."""
    in_place = bool(view.formed.intersection(_world_of(view.live - view.preparing, view, policy)))
    leaving = view.leaving & view.formed
    charged = bool(leaving - view.asked)
    if leaving and (view.restarts < policy.max_restarts or not charged) and (charged or _is_going(view)):
        return Decision(Action.DRAIN, f"{len(leaving)} node(s) must leave", charged=charged, in_place=in_place)
    if 0 < (size := policy.fit(view.live)) < len(view.formed) and _is_going(view):
        why = f"the world changes to {size} node(s), from {len(view.formed)}"
        return Decision(Action.DRAIN, why, charged=False, in_place=in_place)
    newcomers = view.ready - view.formed
    if _has_to_swap(view, policy) and _is_going(view):
        why = f"{len(newcomers)} node(s) that cannot be returned to Slurm replace others"
        return Decision(Action.DRAIN, why, charged=False, in_place=in_place)
    if not newcomers or policy.fit(view.live - view.preparing) <= len(view.formed):
        return Decision(Action.WAIT, "training")
    if not _may_grow(view, policy):
        return Decision(Action.WAIT, "a node is ready to join, but no restart is left for it (--max-restarts)")
    if not _is_going(view):
        return Decision(Action.WAIT, "a node is ready to join after the first step of this round")
    if view.since_growth < policy.grow_every:
        return Decision(
            Action.WAIT, f"a node is ready to join, {policy.grow_every:g} s after the last growth (--grow-every)"
        )
    quiet = NEWCOMER_QUIET_STARTING if view.starting else NEWCOMER_QUIET
    if view.since_newcomer < quiet:
        why = "a node is ready to join; others may follow"
        return Decision(Action.WAIT, why, again=quiet - view.since_newcomer)
    newcomers -= view.preparing
    why, charged = f"{len(newcomers)} more node(s) joined", not policy.free_growth
    return Decision(Action.DRAIN, why, charged=charged, grows=True, in_place=in_place)


def _has_to_swap(view: View, policy: Policy) -> bool:
    """Whether the job holds more nodes than it may, but the nodes outside the world cannot be returned."""
    beside, excess = view.live - view.formed, len(view.live | view.formed) - policy.wanted
    ready = beside and beside <= view.staying & view.ready - view.preparing
    return bool(view.shrinks and excess > 0 and ready and view.formed - view.staying)


def _is_going(view: View) -> bool:
    """Whether the round has done a step, or had enough time for one."""
    return view.going or view.since_formed >= FIRST_STEP_TIMEOUT


def _while_changing(view: View, change: Decision, policy: Policy) -> Decision:
    grace = policy.grace if view.listens else min(policy.grace, LISTEN_TIMEOUT)
    if view.since_change < grace:
        return Decision(Action.WAIT, "the workers save and stop", again=grace - view.since_change)
    return _restart(change, view, policy)


def _while_gathering(view: View, policy: Policy) -> Decision:
    size = policy.fit(view.live)
    patience = TAKE_OVER_WAIT * policy.heartbeat_timeout
    if view.expected and view.since_quorum < patience:
        why = f"{view.expected} node(s) of the last round have not connected yet"
        return Decision(Action.WAIT, why, again=patience - view.since_quorum)
    if not size:
        return _while_too_few(view, policy)
    if view.first and view.absent and view.since_min < policy.last_call_timeout:
        why = f"{view.absent} more granted node(s) may join"
        return Decision(Action.WAIT, why, again=policy.last_call_timeout - view.since_min)
    if view.ready != view.live or (view.leaving | view.barred) - view.idle:
        return Decision(Action.WAIT, "workers of the last round are being stopped")
    if not view.store_ready:
        return _without_store(view, policy)
    prepared = view.ready - view.preparing if _may_grow(view, policy) else view.ready
    world = _world_of(prepared, view, policy) if any(map(votes, prepared)) else ()
    world = world or _world_of(view.ready, view, policy)
    return Decision(Action.FORM, f"{len(world)} nodes are ready", nodes=world)


def _world_of(nodes: frozenset[int], view: View, policy: Policy) -> tuple[int, ...]:
    """The largest world of ``nodes``, in rank order; empty if they are too few for a world. In a job that returns
    nodes, the nodes that cannot leave come first.
    """
    first = sorted(nodes, key=lambda node: (view.shrinks and node not in view.staying, node))
    return tuple(sorted(first[: policy.fit(nodes)]))


def _without_store(view: View, policy: Policy) -> Decision:
    """Wait, then requeue: the store may start on other nodes."""
    if view.without_store < STORE_TIMEOUT:
        so_far = f", failed so far: {view.store_error}" if view.store_error else ""
        left = STORE_TIMEOUT - view.without_store
        return Decision(Action.WAIT, f"the store of the next round is being opened{so_far}", again=left)
    why = view.store_error or "it did not answer"
    why = f"the store of the next round could not be opened within {STORE_TIMEOUT:g} s: {why}"
    return requeue_or_fail(why, view.requeues, policy, "store")


def _while_too_few(view: View, policy: Policy) -> Decision:
    least = policy.sizes[0] if policy.sizes else policy.min_nodes
    if view.first:
        waited, patience = view.since_start, policy.join_timeout
        if view.absent and policy.can_requeue and view.requeues < policy.max_requeues:
            patience = min(patience, waited - view.since_newcomer + STRAGGLER_SHARE * patience)
    else:
        waited, patience = view.below_min, policy.heartbeat_timeout
        if view.coming:
            patience = max(patience, policy.wait_for_nodes)
    if waited < patience:
        more = f", {view.coming} more on the way" if view.coming else ""
        return Decision(Action.WAIT, f"{len(view.live)} of at least {least} nodes have joined{more}")
    out = f"; {len(view.barred)} more stay out, as their workers failed repeatedly" if view.barred else ""
    return requeue_or_fail(f"{len(view.live)} nodes are left, fewer than MIN {least}{out}", view.requeues, policy)


def requeue_or_fail(why: str, requeues: int, policy: Policy, cause: str = "node lost") -> Decision:
    """The job cannot continue in this allocation: requeue it, or fail if that is impossible or the budget is spent."""
    if not policy.can_requeue:
        return Decision(Action.FAIL, f"{why}; this job cannot be requeued", cause)
    if requeues >= policy.max_requeues:
        return Decision(
            Action.FAIL, f"{why}; all {policy.max_requeues} requeues (--max-requeues) are used up", "budget"
        )
    return Decision(Action.REQUEUE, why, cause)
