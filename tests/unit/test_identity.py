"""Only agents of this run, one per node, take part in a job. Whole jobs in simulated time."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import POLICY, Job, SimNode

SEEDS = st.integers(0, 2**32)
BUDGET = replace(POLICY, max_restarts=10, max_nodes=6)


def restarts(job: Job) -> list[str]:
    return [fields["reason"] for _, _, name, fields in job.events if name == "restart"]


def charged(leader: SimNode) -> int:
    """The number of restarts that ``leader`` has counted."""
    server = leader.membership._own_leader.server
    assert server
    return server.leader.restarts


def requeue(job: Job, stays: int) -> SimNode:
    """All agents except that of the node ``stays``, which is cut off, end with their run; the next run has a new agent
    on each node. Returns the agent that stays.
    """
    old = job.nodes[stays]
    job.cut([stays])
    for node in [node for node in job.nodes if node is not old]:
        node.kill()
    job.requeue()
    for index in range(job.size):
        job.add(index, 100 + index if index == stays else index, first=index == 0).start()
    job.cuts |= {frozenset((stays, 100 + stays))}
    return old


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_first_of_two_agents_on_a_node_keeps_its_place_and_the_second_leaves(seed: int, index: int) -> None:
    """For example if an agent took longer than a minute to listen, and was therefore started again."""
    job = Job(seed, 4, BUDGET, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        for again in range(3):
            job.add(index, 100 + again).start()
        assert not await job.until(job.over, 40), job.verdict
        assert restarts(job) == []
        assert [node.left for node in job.nodes] == ["", "", "", "", "lost", "lost", "lost"]
        refused = {fields["reason"] for _, _, name, fields in job.events if name == "refused"}
        assert refused == {f"n{index} has an agent in this job already, which is connected"}

    job.run(story)


@given(SEEDS, st.integers(1, 3), st.sampled_from(["kill", "power_off", "freeze"]))
@settings(max_examples=15, deadline=None)
def test_the_second_agent_of_a_node_takes_the_place_of_a_silent_first_agent(seed: int, index: int, how: str) -> None:
    job = Job(seed, 4, BUDGET, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        first, second = job.nodes[index], job.add(index, 100)
        second.start()
        await job.until(job.over, 3)
        first.freeze(60) if how == "freeze" else getattr(first, how)()
        assert await job.until(lambda: second.workers.alive and job.trained == second.workers.round, 30)
        assert not await job.until(job.over, 90), "if the first agent wakes up, the second has its place"
        assert len(restarts(job)) <= 2, restarts(job)
        if how == "freeze":
            assert first.left == "lost"
            assert second.workers.alive

    job.run(story)


@given(seed=SEEDS, stays=st.integers(0, 3), files=st.booleans())
@settings(max_examples=15, deadline=None)
def test_an_agent_of_the_previous_run_learns_that_and_leaves(*, seed: int, stays: int, files: bool) -> None:
    job = Job(seed, 4, BUDGET, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        old = requeue(job, stays)
        assert old.membership._promises.roster
        present = [node for node in job.nodes if node is not old]
        assert await job.until(lambda: all(node.workers.alive for node in present), 60)
        before = charged(present[-4])
        job.files = files
        job.heal()
        assert await job.until(lambda: old.left == "lost", 30)
        assert not await job.until(job.over, 30)
        assert charged(present[-4]) == before
        assert not [name for _, _, name, _ in job.events if name == "refused"], "the leader never heard of it"
        assert all(node.workers.alive for node in present)
        assert not old.workers.alive

    job.run(story)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_an_agent_of_the_previous_run_that_only_reads_files_leaves_too(seed: int) -> None:
    job = Job(seed, 4, BUDGET, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        old = requeue(job, 1)
        assert await job.until(lambda: old.left == "lost", 30), "it is cut off from all agents"
        assert not job.over()

    job.run(story)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_leader_of_the_previous_run_stops_leading_when_it_meets_the_current_run(seed: int) -> None:
    """The nodes that were cut off at the requeue are a majority, and one of them leads."""
    job = Job(seed, 4, BUDGET, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        old = job.nodes[1:]
        job.files = False
        job.cut([0])
        before = job.trained
        assert await job.until(lambda: job.trained > before, 60)
        job.nodes[0].kill()
        job.requeue()
        present = [job.add(index, 100 + index if index else 0, first=index == 0) for index in range(4)]
        job.heal()
        job.files = True
        present[0].start()
        assert await job.until(lambda: all(node.left == "lost" for node in old), 60)
        for node in present[1:]:
            node.start()
        assert await job.until(lambda: all(node.workers.alive for node in present), 60)

    job.run(story)


@given(SEEDS, st.sampled_from([(0, 1), (1, 2), (2, 3)]))
@settings(max_examples=15, deadline=None)
def test_an_address_that_every_node_has_does_not_pass_for_another_node(seed: int, lost: tuple[int, int]) -> None:
    """Docker's bridge leads to the caller itself: the nodes that are lost must not seem to answer."""
    job = Job(seed, 5, BUDGET, loss=0.0, bridges=("172.17.0.1",))

    async def story() -> None:
        assert await job.until(job.training, 60)
        before = job.trained
        for index in lost:
            job.nodes[index].power_off()
        assert await job.until(lambda: job.training() and job.trained > before, 45), job.events[-5:]

    job.run(story)
