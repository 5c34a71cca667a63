"""The policy over all views: what it never does, and that no state waits forever."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from elastic_hpc.membership.nodes import joiner, votes
from elastic_hpc.membership.policy import Action, Decision, Policy, View
from elastic_hpc.membership.rules import FIRST_STEP_TIMEOUT, LISTEN_TIMEOUT, NEWCOMER_QUIET_STARTING, decide

OWN, JOINERS = st.integers(0, 7), st.integers(0, 3).map(lambda job: joiner(str(job)))
NODES = st.frozensets(OWN | JOINERS, max_size=8)
CHANGES = st.sampled_from(
    [
        Decision(Action.GATHER, "1 node(s) must leave"),
        Decision(Action.GATHER, "1 more node(s) joined", grows=True),
        Decision(Action.GATHER, "1 more node(s) joined", grows=True, charged=False),
    ]
)
SECONDS = st.floats(0, 200)
COUNTS = st.integers(0, 4)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    least, more = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    between = draw(st.frozensets(st.integers(least, least + more)))
    return Policy(
        min_nodes=least,
        max_nodes=least + more,
        sizes=draw(st.sampled_from([(), tuple(sorted(between | {least, least + more}))])),
        spares=draw(COUNTS),
        grow=draw(st.booleans()),
        free_growth=draw(st.booleans()),
        grow_every=draw(SECONDS),
        wait_for_nodes=draw(SECONDS),
        max_restarts=draw(COUNTS),
        max_requeues=draw(COUNTS),
        heartbeat_timeout=draw(st.floats(0.1, 30)),
        join_timeout=draw(SECONDS),
        last_call_timeout=draw(SECONDS),
        grace=draw(SECONDS),
        can_requeue=draw(st.booleans()),
    )


ANY_VIEWS = st.builds(
    View,
    formed=NODES,
    lost=NODES,
    succeeded=NODES,
    failure=st.sampled_from([None, "rank 0 on n0: exit code 1"]),
    cause=st.sampled_from(["exit", "node lost"]),
    of_network=st.booleans(),
    probed=st.booleans(),
    probing=st.sampled_from([0.0, 3.0]),
    apart=st.sampled_from(["", "n1 and n2 do not reach each other"]),
    parts=st.booleans(),
    settling=st.booleans(),
    repeated=st.booleans(),
    suspect=st.none() | OWN,
    known=st.sampled_from(["", "a disk is full"]),
    ready=NODES,
    live=NODES,
    leaving=NODES,
    asked=NODES,
    returning=st.frozensets(OWN, max_size=2),
    staying=st.frozensets(OWN, max_size=2),
    settled=st.booleans(),
    shrinks=st.booleans(),
    barred=st.frozensets(OWN, max_size=2),
    idle=NODES,
    preparing=NODES,
    paused=NODES,
    since_newcomer=SECONDS,
    starting=COUNTS,
    coming=COUNTS,
    since_growth=SECONDS,
    since_formed=SECONDS,
    going=st.booleans(),
    listens=st.booleans(),
    change=st.none() | CHANGES,
    since_change=SECONDS,
    absent=COUNTS,
    first=st.booleans(),
    since_start=SECONDS,
    since_min=SECONDS,
    below_min=SECONDS,
    quorum=st.booleans(),
    without_quorum=SECONDS,
    expected=COUNTS,
    since_quorum=SECONDS,
    store_ready=st.booleans(),
    store_error=st.sampled_from(["", "no port"]),
    without_store=SECONDS,
    restarts=COUNTS,
    requeues=COUNTS,
    request=st.sampled_from([None, "drain", "save-and-stop", "stop"]),
    requested_for=st.sampled_from(["time limit", "preempted", "user", "terminated"]),
    since_request=SECONDS,
    drained=st.booleans(),
)


def gathering(view: View) -> View:
    """All connected nodes are ready, and nothing else needs a decision."""
    calm = replace(view, formed=frozenset(), lost=frozenset(), failure=None, request=None, ready=view.live)
    calm = replace(calm, barred=frozenset())
    return replace(calm, quorum=True, store_ready=True, leaving=frozenset(), idle=view.live)


def training(view: View) -> View:
    return replace(view, formed=view.formed | {0}, lost=view.lost - view.formed - {0}, quorum=True)


VIEWS = ANY_VIEWS | ANY_VIEWS.map(gathering) | ANY_VIEWS.map(training)
EVERYTHING = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def after_long(view: View, policy: Policy) -> View:
    """The same state after a day without events; only the durations that the leader lets grow have grown."""
    enough = bool(policy.fit(view.live))
    day = 86400.0
    return replace(
        view,
        settling=False,  # this lasts SETTLE seconds
        probing=0.0,
        since_start=view.since_start + day,
        since_min=view.since_min + day if enough else 0.0,
        below_min=0.0 if enough else view.below_min + day,
        without_quorum=0.0 if view.quorum else view.without_quorum + day,
        since_quorum=view.since_quorum + day,
        since_request=view.since_request + day,
        since_newcomer=view.since_newcomer + day,
        since_growth=view.since_growth + day,
        since_formed=view.since_formed + day,
        since_change=view.since_change + day,
        without_store=0.0 if view.store_ready else view.without_store + day,
    )


@given(VIEWS, policies())
@EVERYTHING
def test_without_a_majority_the_leader_only_waits_or_stops_leading(view: View, policy: Policy) -> None:
    decision = decide(replace(view, quorum=False), policy)
    assert decision.action in {Action.WAIT, Action.ABDICATE}
    if view.formed and not view.confirming:
        assert decision.action is Action.ABDICATE, "workers run: they stop at once"


@given(VIEWS, policies())
@EVERYTHING
def test_with_a_majority_the_leader_never_stops_leading_without_a_verdict(view: View, policy: Policy) -> None:
    assert decide(replace(view, quorum=True), policy).action is not Action.ABDICATE


@given(VIEWS, policies())
@EVERYTHING
def test_a_world_has_an_allowed_size_and_ready_nodes(view: View, policy: Policy) -> None:
    decision = decide(view, policy)
    assert bool(decision.nodes) == (decision.action in {Action.FORM, Action.RELEASE})
    if decision.action is Action.FORM:
        assert policy.min_nodes <= len(decision.nodes) <= policy.max_nodes
        prepared = view.ready - view.preparing
        assert len(decision.nodes) in {policy.fit(view.ready), policy.fit(prepared)}
        assert any(map(votes, decision.nodes))
        assert list(decision.nodes) == sorted(set(decision.nodes)), "ranks follow Slurm's order"
        assert set(decision.nodes) <= view.ready == view.live
        assert view.quorum
        assert view.store_ready
        assert not view.running, "no round runs"
        assert not view.request


@given(VIEWS, policies())
@EVERYTHING
def test_charges_stay_within_the_budget(view: View, policy: Policy) -> None:
    decision = decide(view, policy)
    if decision.action is Action.GATHER:
        assert decision.charged or decision.grows
        assert view.restarts < policy.max_restarts or not decision.charged
        assert view.running, "a round that is gathered is not broken off for another"
    if decision.action is Action.REQUEUE:
        assert policy.can_requeue
        assert view.requeues < policy.max_requeues if decision.charged else view.request


@given(VIEWS, policies())
@EVERYTHING
def test_every_decision_has_a_reason_and_every_failure_a_cause(view: View, policy: Policy) -> None:
    decision = decide(view, policy)
    assert decision.reason
    assert bool(decision.cause) == (decision.action in {Action.FAIL, Action.REQUEUE})
    assert decision == decide(view, policy)


@given(VIEWS, policies())
@EVERYTHING
def test_finished_means_that_all_remaining_nodes_of_an_unbroken_round_have_finished(view: View, policy: Policy) -> None:
    if decide(view, policy).action is Action.FINISH:
        assert view.formed
        assert view.formed <= view.succeeded
        assert not view.lost
        assert view.request != "stop"


@given(VIEWS, policies())
@EVERYTHING
def test_no_state_waits_forever(view: View, policy: Policy) -> None:
    """After a day without events no node waits, except in these two states, which end in other ways:

    * a whole round trains and there is no request: its workers, ``--hang-timeout`` or Slurm end it;
    * workers of the last round are being stopped: ``Leader.on_tick`` gives a node up after ``STOP_TIMEOUT``.
    """
    view = after_long(view, policy)
    decision = decide(view, policy)
    if decision.action is not Action.WAIT:
        return
    assert view.quorum
    assert view.request is None
    if view.running:
        assert view.formed
        assert not view.formed <= view.succeeded
        assert not view.lost
        assert view.failure is None
    else:
        assert policy.fit(view.live)
        assert view.ready != view.live or (view.leaving | view.barred) - view.idle


@given(VIEWS, policies())
@EVERYTHING
def test_a_request_ends_the_job_or_its_reign(view: View, policy: Policy) -> None:
    assume(view.request)
    assert decide(after_long(view, policy), policy).action in {
        Action.FAIL,
        Action.REQUEUE,
        Action.FINISH,
        Action.ABDICATE,
    }


@given(VIEWS, policies())
@EVERYTHING
def test_every_wait_for_time_is_within_the_users_timeouts(view: View, policy: Policy) -> None:
    """A wait that ends within a day also ends within the longest timeout."""
    late = after_long(view, policy)
    if decide(late, policy).action is Action.WAIT:
        return
    timeouts = (policy.join_timeout, policy.last_call_timeout, policy.grace, policy.grow_every, policy.wait_for_nodes)
    longest = max(policy.heartbeat_timeout, NEWCOMER_QUIET_STARTING, LISTEN_TIMEOUT, FIRST_STEP_TIMEOUT, *timeouts)
    names = ("since_start", "since_min", "below_min", "without_quorum", "since_quorum", "since_request")
    names += ("since_newcomer", "since_growth", "since_change", "since_formed")
    bounded = replace(late, **{name: min(getattr(late, name), longest) for name in names})
    assert decide(bounded, policy).action is not Action.WAIT


@given(VIEWS, policies())
@EVERYTHING
def test_only_idle_nodes_are_released_and_own_nodes_only_if_slurm_may_have_them_back(
    view: View, policy: Policy
) -> None:
    decision = decide(view, policy)
    if decision.action is Action.RELEASE:
        assert not view.formed.intersection(decision.nodes)
        assert set(decision.nodes) <= view.idle | view.ready
        if own := set(filter(votes, decision.nodes)):
            assert view.settled, "no majority needs them"
            assert not own & view.staying
            assert own <= view.returning or view.shrinks


@given(VIEWS, policies())
@settings(EVERYTHING, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_a_job_that_may_have_fewer_nodes_shrinks_to_them_without_charge_and_keeps_its_leader(
    view: View, policy: Policy
) -> None:
    view = replace(view, going=True, failure=None, lost=frozenset(), succeeded=frozenset(), request=None)
    view = replace(view, shrinks=True, change=None, quorum=True, drained=False, leaving=frozenset())
    view = replace(view, restarts=policy.max_restarts)
    view = replace(view, formed=view.live | view.staying, live=view.live | view.staying, ready=frozenset())
    size = policy.fit(view.live)
    assume(0 < size < len(view.formed) and votes(min(view.live)))
    decision = decide(view, policy)
    assert (decision.action, decision.charged) == (Action.DRAIN, False)
    view = replace(view, formed=frozenset(), ready=view.live, idle=view.live, store_ready=True, barred=frozenset())
    view = replace(view, expected=0, first=False, preparing=frozenset())
    world = decide(view, policy)
    assume(world.action is Action.FORM)
    assert len(world.nodes) == size
    assert view.staying <= set(world.nodes) or len(view.staying) > size


@given(VIEWS, policies())
@EVERYTHING
def test_a_round_waits_for_standbys_only_if_it_needs_them(view: View, policy: Policy) -> None:
    decision = decide(view, policy)
    if decision.action is Action.FORM and view.preparing.intersection(decision.nodes):
        prepared = view.ready - view.preparing
        may_come_back = policy.free_growth or view.restarts < policy.max_restarts
        assert not (policy.fit(prepared) and any(map(votes, prepared)) and may_come_back)


def _next_world(view: View, policy: Policy) -> frozenset[int]:
    """The nodes of the world that is formed after all workers of the round have stopped."""
    here = view.live - view.preparing
    stopped = replace(view, formed=frozenset(), ready=here, live=here, idle=here, preparing=frozenset(), first=False)
    stopped = replace(stopped, leaving=frozenset(), barred=frozenset(), expected=0, store_ready=True)
    decision = decide(stopped, policy)
    assume(decision.action is not Action.RELEASE)
    return frozenset(decision.nodes)


@given(VIEWS, policies())
@EVERYTHING
def test_workers_are_asked_to_save_before_an_optional_change_of_the_world(view: View, policy: Policy) -> None:
    decision = decide(view, policy)
    if decision.action is Action.DRAIN:
        assert not view.lost
        assert view.failure is None
        assert not view.succeeded
        larger = policy.fit(view.live - view.preparing) > len(view.formed)
        smaller = 0 < policy.fit(view.live) < len(view.formed)
        why = "nobody stands still for a node whose workers are still starting"
        swapped = view.shrinks and view.live - view.formed <= view.staying
        assert larger or smaller or swapped or view.leaving & view.formed, why
        assert decision.in_place == bool(view.formed & _next_world(view, policy)), "else what is not saved is lost"
    if decision.action is Action.GATHER:
        assert view.failure or view.lost or view.drained or view.change
