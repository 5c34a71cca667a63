"""The leader and its agents as a distributed protocol, under a simulated network; seeded, so that a failure repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated import Simulation

from elastic_hpc.decide import Policy
from elastic_hpc.leader import STOP_TIMEOUT, Leader
from elastic_hpc.protocol import Failure, Order, Status

POLICY = Policy(
    min_nodes=2,
    max_nodes=4,
    max_restarts=100,
    max_requeues=2,
    heartbeat_timeout=5.0,
    join_timeout=60.0,
    last_call_timeout=10.0,
    can_requeue=True,
)
SEEDS = st.integers(0, 2**32)


def training(simulation: Simulation) -> bool:
    """Every agent that is left runs the leader's round, or waits beside a full world."""
    left = [agent for agent in simulation.agents if not agent.left]
    running = [agent for agent in left if agent.alive and agent.workers == simulation.leader.round]
    return len(running) == min(len(left), simulation.policy.max_nodes)


def inject(simulation: Simulation, *, seconds: float) -> None:
    """Random faults for ``seconds``."""
    dice = simulation.random
    end = simulation.now + seconds
    while simulation.now < end and not simulation.leader.verdict:
        agent = dice.choice(simulation.agents)
        match dice.randrange(5):
            case 0:
                simulation.end_workers(agent, failed=True)
            case 1:
                simulation.disconnect(agent)
            case 2:
                simulation.freeze_leader(dice.uniform(0, 12))
            case 3:
                simulation.end_workers(agent, failed=True)
                simulation.disconnect(dice.choice(simulation.agents))
        simulation.run(dice.choice((0.0, 0.01, 0.3, dice.uniform(0, 8))))


@given(SEEDS, st.integers(2, 6))
@example(4451174, 4)  # reconnected while its workers were being stopped, and never said that they were gone
@settings(max_examples=150, deadline=None)
def test_the_job_trains_again_after_any_faults_and_never_overlaps_rounds(seed: int, nodes: int) -> None:
    simulation = Simulation(seed, nodes=nodes, policy=POLICY)
    inject(simulation, seconds=60)
    simulation.loss = 0.0
    verdict = lambda: simulation.leader.verdict is not None  # noqa: E731 - read at each step
    assert simulation.run(300, until=lambda: training(simulation) or verdict()), simulation.events[-5:]
    if not verdict():
        started = {round: plan.group_world_size for agent in simulation.agents for round, plan in agent.started}
        for round, size in started.items():
            plans = [plan for agent in simulation.agents for r, plan in agent.started if r == round]
            assert {plan.group_world_size for plan in plans} == {size}
            assert len({plan.group_rank for plan in plans}) == len(plans)
            assert len({(plan.restart_count, plan.store_port) for plan in plans}) == 1


@given(SEEDS, st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_never_exceeded_and_ends_the_job(seed: int, max_restarts: int) -> None:
    simulation = Simulation(seed, nodes=3, policy=replace(POLICY, max_restarts=max_restarts))
    for _ in range(max_restarts + 20):
        simulation.run(200, until=lambda: training(simulation) or bool(simulation.leader.verdict))
        simulation.end_workers(simulation.agents[0], failed=True)
    assert simulation.leader.verdict
    assert simulation.leader.verdict.outcome == "failed"
    assert simulation.leader.restarts == max_restarts
    assert simulation.run(60, until=lambda: all(agent.left == "failed" for agent in simulation.agents))


@given(SEEDS, st.integers(2, 5), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_silent_nodes_are_given_up_and_the_rest_goes_on_or_is_requeued(seed: int, nodes: int, lost: int) -> None:
    simulation = Simulation(seed, nodes=nodes, policy=POLICY, loss=0.0)
    assert simulation.run(60, until=lambda: training(simulation))
    for agent in simulation.agents[-min(lost, nodes) :]:
        simulation.lose(agent)
    left = max(0, nodes - lost)
    before = simulation.leader.round
    if left >= POLICY.min_nodes and nodes <= POLICY.max_nodes:
        assert simulation.run(60, until=lambda: training(simulation) and simulation.leader.round > before)
    elif left < POLICY.min_nodes:
        assert simulation.run(60, until=lambda: bool(simulation.leader.verdict))
        assert simulation.leader.verdict
        assert simulation.leader.verdict.outcome == "requeue"


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_job_is_finished_only_when_all_of_one_round_have_finished(seed: int) -> None:
    simulation = Simulation(seed, nodes=3, policy=POLICY)
    assert simulation.run(300, until=lambda: training(simulation))
    simulation.end_workers(simulation.agents[0], failed=False)
    simulation.end_workers(simulation.agents[1], failed=False)
    assert not simulation.run(20, until=lambda: bool(simulation.leader.verdict))
    simulation.end_workers(simulation.agents[2], failed=True)  # the others must run again
    assert simulation.run(300, until=lambda: training(simulation))
    for agent in simulation.agents:
        simulation.end_workers(agent, failed=False)
    assert simulation.run(60, until=lambda: all(agent.left == "finished" for agent in simulation.agents))


def test_a_node_that_leaves_after_its_part_is_done_does_not_restart_the_others() -> None:
    simulation = Simulation(1, nodes=3, policy=POLICY, loss=0.0)
    assert simulation.run(60, until=lambda: training(simulation))
    simulation.end_workers(simulation.agents[2], failed=False)
    simulation.run(3)
    simulation.lose(simulation.agents[2])
    simulation.run(20)
    for agent in simulation.agents[:2]:
        simulation.end_workers(agent, failed=False)
    assert simulation.run(20, until=lambda: bool(simulation.leader.verdict))
    assert simulation.leader.verdict
    assert (simulation.leader.verdict.outcome, simulation.leader.restarts) == ("finished", 0)


def test_a_late_node_is_taken_in_by_a_new_round() -> None:
    simulation = Simulation(2, nodes=4, policy=POLICY, loss=0.0)
    late = simulation.agents[3]
    late.left = "late"
    assert simulation.run(60, until=lambda: len(simulation.agents[0].started) == 1)
    assert simulation.agents[0].started[0][1].group_world_size == 3
    late.left = ""
    simulation.connect(late)
    assert simulation.run(30, until=lambda: training(simulation))
    assert simulation.agents[0].started[-1][1].group_world_size == 4
    assert simulation.leader.restarts == 1


# single steps of the leader, without a network


def leader(now: float = 0.0, granted: int = 2, **changes: object) -> Leader:
    return Leader(replace(POLICY, **changes), granted=granted, nproc=2, now=now)  # type: ignore[arg-type]


def say(target: Leader, conn: int, seq: int, now: float, **fields: object) -> dict[int, Order]:
    target.on_status(
        conn, "10.0.0.1", Status(**{"seq": seq, "node": conn, "name": f"n{conn}", "nproc": 2, **fields}), now
    )  # type: ignore[arg-type]
    return target.take_orders()


def formed(now: float = 0.0, **changes: object) -> Leader:
    target = leader(now, **changes)
    target.on_store(1, 29400, now)
    for conn in (0, 1):
        say(target, conn, 1, now, round=1)
    assert target.take_orders() == {}
    return target


def test_a_round_forms_without_any_wait_when_all_granted_nodes_are_there() -> None:
    target = leader()
    target.on_store(1, 29400, 0.0)
    assert say(target, 0, 1, 0.1)[0].stage == "gather"
    say(target, 0, 2, 0.1, round=1)
    assert say(target, 1, 1, 0.2)[1].stage == "gather"
    orders = say(target, 1, 2, 0.2, round=1)
    assert {order.stage for order in orders.values()} == {"run"}
    assert [orders[conn].plan.group_rank for conn in (0, 1)] == [0, 1]  # type: ignore[union-attr]


def test_a_statement_about_an_old_round_changes_nothing() -> None:
    target = formed()
    failure = Failure("exit", "n1", 1, 0, 1, "exit code 1", 0.0)
    say(target, 1, 2, 1.0, state="failed", round=1, failure=failure)
    assert target.round == 2
    say(target, 0, 2, 1.1, state="failed", round=1, failure=failure)
    assert (target.round, target.restarts) == (2, 1)


def test_the_first_failure_of_a_round_is_the_cause() -> None:
    target = formed(max_restarts=0)
    for conn, message in ((1, "out of memory"), (0, "connection reset")):
        failure = Failure("exit", f"n{conn}", conn, 0, 1, message, 0.0)
        say(target, conn, 2, 1.0, state="failed", round=1, failure=failure)
    assert target.verdict
    assert target.verdict.failure
    assert target.verdict.failure.message == "out of memory"


def test_a_leader_that_was_frozen_does_not_blame_its_agents() -> None:
    target = formed()
    target.on_tick(1.0)
    target.on_tick(100.0)
    assert target.take_dropped() == []
    target.on_tick(101.0)
    target.on_tick(102.0)
    target.on_tick(103.0)
    target.on_tick(104.0)
    target.on_tick(105.2)
    assert sorted(target.take_dropped()) == [0, 1]


def test_workers_that_cannot_be_stopped_do_not_hold_up_the_others_for_ever() -> None:
    target = formed(granted=3, last_call_timeout=0.0, min_nodes=1)
    say(target, 0, 2, 1.0, state="failed", round=1, failure=Failure("exit", "n0", 0, 0, 1, "exit code 1", 0.0))
    target.on_store(2, 29401, 1.0)
    now = 1.0
    for beat in range(int(STOP_TIMEOUT) + 5):
        now += 1
        say(target, 0, 10 + beat, now, round=2)
        say(target, 1, 10 + beat, now, state="running", round=1)
        target.on_tick(now)
    assert target.take_dropped() == [1]
    assert target.take_orders(beat=True)[0].plan
    assert say(target, 2, 1, now, state="running", round=1)[2].stage == "run"
    assert target.round == 2  # it is no newcomer before its workers are gone


def test_a_node_with_another_number_of_workers_is_refused_with_the_reason() -> None:
    target = leader()
    orders = say(target, 1, 1, 0.0, nproc=1)
    assert orders[1].stage == "end"
    assert "n1 would start 1 workers, the first host 2" in orders[1].reason
    assert target.verdict is None


def test_a_second_agent_of_a_node_replaces_the_first() -> None:
    target = formed()
    target.on_status(7, "10.0.0.1", Status(1, 1, "n1", 2), 1.0)
    assert target.take_dropped() == [1]
    assert target.round == 2


@pytest.mark.parametrize(("request_", "outcome", "requeues"), [("drain", "requeue", 0), ("stop", "failed", 0)])
def test_a_request_ends_the_job_without_a_charge(request_: str, outcome: str, requeues: int) -> None:
    target = formed()
    target.on_request(request_, "10.0.0.9", 1.0)  # type: ignore[arg-type]
    assert target.verdict
    assert (target.verdict.outcome, target.verdict.requeues, target.verdict.restarts) == (outcome, requeues, 0)
    assert target.take_orders()[0].stage == "gather"  # workers stop; nobody leaves before the verdict is on disk
    target.on_saved()
    assert target.take_orders()[0].outcome == outcome
