"""The job as a distributed protocol: seeded faults on simulated nodes, networks and clocks; failures repeat."""

from __future__ import annotations

import asyncio
import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated import POLICY, Job, SimNode

SEEDS = st.integers(0, 2**32)


async def inject(job: Job, seconds: float) -> None:
    """Random faults for ``seconds``; nodes are cut off and frozen, but never lost permanently."""
    dice = job.random
    end = job.now + seconds
    while job.now < end and not job.over():
        node: SimNode = dice.choice(job.nodes)
        match dice.randrange(6):
            case 0:
                node.end_workers(failed=True)
            case 1:
                job.cut(dice.sample(range(job.size), dice.randrange(1, job.size)))
            case 2:
                job.heal()
            case 3:
                node.freeze(dice.uniform(0, 12))
            case 4:
                node.end_workers(failed=True)
                job.cut([node.index])
            case 5:
                job.files = not job.files
        await job.until(job.over, dice.choice((0.0, 0.01, 0.3, dice.uniform(0, 12))))
    job.heal()
    job.loss, job.files = 0.0, True


@given(SEEDS, st.integers(2, 6))
@example(11, 5)  # an empty roster counted as knowledge of a round
@example(271, 5)  # members of newer rounds were dropped from an older roster
@example(1003, 5)  # a leader forgot the roster that it had formed itself
@settings(max_examples=60, deadline=None)
def test_the_job_trains_again_after_any_faults_and_never_in_two_worlds(seed: int, nodes: int) -> None:
    job = Job(seed, nodes, POLICY)

    async def story() -> None:
        await inject(job, 90)
        assert await job.until(lambda: job.training() or job.over(), 200), job.events[-8:]

    job.run(story)


@given(SEEDS, st.integers(3, 6), st.sampled_from(["power", "kill"]))
@settings(max_examples=40, deadline=None)
def test_the_next_node_takes_over_when_the_head_is_lost(seed: int, nodes: int, how: str) -> None:
    job = Job(seed, nodes, replace(POLICY, max_nodes=6), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        lost_at, before = job.now, job.trained
        job.nodes[0].power_off() if how == "power" else job.nodes[0].kill()
        assert await job.until(lambda: job.training() and job.trained > before, 30), job.events[-5:]
        # heartbeat timeout + 1 s, plus one second for this network and these workers
        assert job.now - lost_at < 5.0 + 1.0 + 3.0
        assert [index for _, index, name, _ in job.events if name == "take_over"] == [1]
        formed = [fields for _, _, name, fields in job.events if name == "round"][-1]
        assert (len(formed["nodes"]), formed["restarts"], formed["leader"]) == (nodes - 1, 1, "n1")

    job.run(story)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_job_survives_the_loss_of_one_head_after_another(seed: int) -> None:
    job = Job(seed, 6, replace(POLICY, max_nodes=6), loss=0.0)

    async def story() -> None:
        for lost in range(4):
            assert await job.until(job.training, 60), job.events[-5:]
            job.nodes[lost].power_off()
            before = job.trained
            assert await job.until(lambda before=before: job.trained > before, 60), job.events[-5:]

    job.run(story)


@given(SEEDS, st.integers(3, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_the_majority_continues_and_the_others_rejoin_as_newcomers(seed: int, nodes: int, data: st.DataObject) -> None:
    job = Job(seed, nodes, replace(POLICY, max_nodes=6), loss=0.0)
    away = data.draw(st.lists(st.integers(0, nodes - 1), min_size=1, max_size=(nodes - 1) // 2, unique=True))
    files = data.draw(st.booleans())

    async def story() -> None:
        assert await job.until(job.training, 60)
        before = job.trained
        job.files = files
        job.cut(away)
        stay = [node for node in job.nodes if node.index not in away]
        if len(stay) < POLICY.min_nodes:
            assert await job.until(job.over, 60)
            return
        assert await job.until(
            lambda: job.trained > before and not any(job.nodes[index].workers.round for index in away), 30
        ), job.events[-5:]
        assert all(node.workers.round == job.trained for node in stay)
        job.heal()
        assert await job.until(job.training, 60), job.events[-5:]
        assert not job.over()

    job.run(story)


@given(seed=SEEDS, files=st.booleans())
@settings(max_examples=30, deadline=None)
def test_of_two_halves_the_one_with_the_leader_continues(*, seed: int, files: bool) -> None:
    job = Job(seed, 4, POLICY, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        before = job.trained
        job.files = files
        job.cut([2, 3])
        assert await job.until(lambda: job.trained > before, 30)
        assert [node.workers.round > before for node in job.nodes] == [True, True, False, False]
        job.heal()
        job.files = True
        assert await job.until(job.training, 60)

    job.run(story)


@given(SEEDS, st.floats(6, 20))
@settings(max_examples=40, deadline=None)
@example(0, 13.0)  # the first leader also becomes the next one
def test_after_a_full_partition_the_new_leader_reports_which_nodes_were_lost_and_how(seed: int, apart: float) -> None:
    job = Job(seed, 4, POLICY, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        before = job.trained
        job.cuts = {frozenset(pair) for pair in itertools.combinations(range(4), 2)}
        await asyncio.sleep(apart)
        job.heal()
        assert await job.until(lambda: job.over() or (job.training() and job.trained > before), 60)
        why = [fields["reason"] for _, _, name, fields in job.events if name in {"take_over", "restart"}]
        assert all(
            re.fullmatch(r"n[0-3] lost: no heartbeat for 5 s|\d more node\(s\) joined", reason) for reason in why
        ), why

    job.run(story)


@given(SEEDS, st.integers(2, 6), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_an_allocation_with_too_few_nodes_is_never_kept(seed: int, nodes: int, lost: int) -> None:
    job = Job(seed, nodes, replace(POLICY, max_nodes=6), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        order = job.random.sample(range(nodes), min(lost, nodes - 1))
        for index in order:
            job.nodes[index].power_off()
            await job.until(job.over, job.random.choice((0.0, 3.0)))
        assert await job.until(lambda: job.over() or (job.training() and len(job.left) >= POLICY.min_nodes), 120)
        if len(job.left) < POLICY.min_nodes:
            assert job.over()

    job.run(story)


@given(SEEDS, st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_the_budget_of_restarts_is_never_exceeded_and_ends_the_job(seed: int, max_restarts: int) -> None:
    job = Job(seed, 3, replace(POLICY, max_restarts=max_restarts))

    async def story() -> None:
        while not job.over():
            assert await job.until(lambda: job.training() or job.over(), 200)
            job.random.choice(job.nodes).end_workers(failed=True)
            await job.until(job.over, 0.5)
        assert job.verdict
        assert (job.verdict["outcome"], job.verdict["cause"], job.verdict["restarts"]) == (
            "failed",
            "budget",
            max_restarts,
        )
        assert await job.until(lambda: all(node.left for node in job.nodes), 30)

    job.run(story)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_job_is_finished_only_when_all_nodes_of_one_round_have_finished(seed: int) -> None:
    job = Job(seed, 3, POLICY)

    async def story() -> None:
        assert await job.until(job.training, 100)
        job.nodes[0].end_workers(failed=False)
        job.nodes[1].end_workers(failed=False)
        assert not await job.until(job.over, 20)
        job.nodes[2].end_workers(failed=True)  # the other nodes must run again
        while not job.over():
            assert await job.until(lambda: job.training() or job.over(), 100)
            for node in job.nodes:
                node.end_workers(failed=False)
            await job.until(job.over, 1)
        assert await job.until(lambda: all(node.left == "finished" for node in job.nodes), 60)

    job.run(story)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
@example(seed=340216)
def test_unused_nodes_that_were_cut_off_while_a_round_formed_are_no_second_world(seed: int) -> None:
    """MAX is 3: round 1 has nodes 0, 3 and 4, round 2 has 0, 1 and 2. Just then 3 and 4, which do not know of round 2
    yet and are the majority of round 1, are cut off.
    """
    job = Job(seed, 5, replace(POLICY, max_nodes=3), loss=0.0)
    late = [(node, node.start) for node in job.nodes[1:3]]
    for node, _ in late:
        node.start = lambda: None  # type: ignore[method-assign]

    async def story() -> None:
        assert await job.until(lambda: job.trained == 1, 60)
        assert [node.index for node in job.nodes if node.workers.alive] == [0, 3, 4]
        for _, start in late:
            start()
        await job.until(lambda: False, 5)
        job.nodes[3].end_workers(failed=True)
        for _ in range(20_000):
            if any(name == "round" and fields["round"] == 2 for _, _, name, fields in job.events):
                break
            await asyncio.sleep(0.0005)
        job.cut([3, 4])
        job.files = False
        for _ in range(10_000):
            job.check()
            await asyncio.sleep(0.001)
        job.heal()  # round 2 trains only now if it was not acknowledged before the cut
        job.files = True
        assert await job.until(lambda: job.trained > 1 and job.training(), 100), job.events[-8:]

    job.run(story)


def test_a_spare_that_was_cut_off_from_the_only_node_that_may_lead_rejoins() -> None:
    job = Job(1, 2, replace(POLICY, min_nodes=1, max_nodes=1, spares=1), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        assert await job.until(lambda: bool(job.nodes[1].membership._promises.roster), 60)
        server = job.nodes[0].membership._own_leader.server
        assert server
        job.cut([1])
        assert await job.until(lambda: 1 not in server.leader.peers.by_node, 30)
        await asyncio.sleep(10)
        job.heal()
        assert await job.until(lambda: 1 in server.leader.peers.by_node, 30)

    job.run(story)


def test_a_late_node_joins_in_a_new_round() -> None:
    job = Job(2, 4, POLICY, loss=0.0)
    late = job.nodes[3]
    start, late.start = late.start, lambda: None  # type: ignore[method-assign]

    async def story() -> None:
        assert await job.until(lambda: len(job.nodes[0].started) == 1, 60)
        assert job.nodes[0].started[0][1].group_world_size == 3
        start()
        assert await job.until(job.training, 30)
        assert job.nodes[0].started[-1][1].group_world_size == 4
        assert job.nodes[0].started[-1][1].restart_count == 1

    job.run(story)


@pytest.mark.parametrize("how", ["power_off", "kill"])
def test_a_node_that_is_lost_after_finishing_does_not_restart_the_others(how: str) -> None:
    job = Job(1, 3, POLICY, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.nodes[2].end_workers(failed=False)
        await job.until(job.over, 3)
        getattr(job.nodes[2], how)()
        await job.until(job.over, 20)
        for node in job.nodes[:2]:
            node.end_workers(failed=False)
        assert await job.until(job.over, 20)
        assert job.verdict
        assert (job.verdict["outcome"], job.verdict["restarts"]) == ("finished", 0)

    job.run(story)


@given(SEEDS, st.integers(0, 2))
@settings(max_examples=10, deadline=None)
def test_the_only_node_on_which_workers_fail_stays_excluded_under_another_leader(seed: int, bad: int) -> None:
    policy = replace(POLICY, min_nodes=2, max_nodes=3, spares=1, grow=False, max_restarts=10)
    job = Job(seed, 4, policy, loss=0.0, scripts_progress=False)

    def world() -> set[int]:
        """The nodes of the only world that trains."""
        running = [node for node in job.left if node.workers.alive]
        whole = running and len(running) == running[0].started[-1][1].group_world_size
        return {node.index for node in running} if whole else set()

    async def story() -> None:
        for _ in range(2):
            assert await job.until(lambda: bad in world(), 60)
            job.at[bad].end_workers(failed=True, kind="exception", message="CUDA error: launch failure")
            assert await job.until(lambda: not world(), 10)
        others = set(range(job.size)) - {bad}
        assert await job.until(lambda: world() == others, 60), job.events[-8:]
        leader = next(fields["leader"] for _, _, name, fields in reversed(job.events) if name == "round")
        job.at[int(leader[1:])].kill()
        assert await job.until(lambda: not world(), 10)
        assert await job.until(lambda: len(world()) >= 2, 60), job.events[-8:]
        assert not await job.until(lambda: bad in world(), 60)
        assert not job.over()

    job.run(story)
