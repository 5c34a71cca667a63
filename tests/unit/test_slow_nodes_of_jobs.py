"""Whole jobs in simulated time with a node that is slower than the others: the job names it, and leaves it if the user
wants that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from simulated import POLICY, Job, SimNode, SimRecord

from elastic_hpc.agent.health import Health, Watcher
from elastic_hpc.agent.lookout import Outlook
from elastic_hpc.membership.messages import Status, decode_from_agent, encode
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.slow import Pace
from elastic_hpc.view.story_builder import story_of


@dataclass
class Steps:
    """Ten steps a second; all nodes wait for the slowest."""

    job: Job
    slow: dict[int, float] = field(default_factory=dict)
    """Factors of the step time, by node."""
    began: dict[tuple[int, int], float] = field(default_factory=dict)

    def __call__(self, node: SimNode) -> Pace:
        began = self.began.setdefault((node.index, node.workers.round), self.job.now)
        return Pace(int(10 * (self.job.now - began)), 0.04 * self.slow.get(node.index, 1.0))


def events(job: Job, name: str) -> list[dict[str, Any]]:
    return [fields for _, _, event, fields in job.events if event == name]


def world(job: Job) -> list[str]:
    found = events(job, "round")
    return found[-1]["nodes"] if found and job.training() else []


def nobody_says(_record: SimRecord) -> list[Outlook]:
    """Slurm and the site know of no bad node, and report that every ten seconds."""

    async def ask(_names: set[str]) -> dict[str, str]:
        return {}

    return Health([Watcher("nodes", 10.0, ask)], None).outlooks


def made(seed: int, size: int, **policy: Any) -> tuple[Job, Steps]:
    policy = {"grow": False, "min_nodes": 2, "max_nodes": size, "slow_factor": 1.5, **policy}
    job = Job(seed, size, replace(POLICY, **policy), loss=0.0, scripts_listen=True, outlooks=nobody_says)
    job.pace = steps = Steps(job)
    return job, steps


async def time_passes(job: Job, seconds: float) -> None:
    assert not await job.until(lambda: False, seconds)


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_node_is_named_once_and_stays(seed: int) -> None:
    job, steps = made(seed, 4)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 4, 60)
        await time_passes(job, 60)
        assert events(job, "slow") == []
        steps.slow = {2: 2.0}
        assert await job.until(lambda: bool(events(job, "slow")), 20), "within 200 steps"
        await time_passes(job, 60)
        (slow,) = events(job, "slow")
        assert (slow["node"], slow["times"], slow["seconds"]) == ("n2", 2.0, 0.08)
        steps.slow = {}
        assert await job.until(lambda: bool(events(job, "slow_over")), 20)
        await time_passes(job, 60)
        assert [fields["node"] for fields in events(job, "slow_over")] == ["n2"]
        assert (len(events(job, "round")), events(job, "leave"), events(job, "stays")) == (1, [], [])

    job.run(story)


@pytest.mark.parametrize("seed", range(3))
def test_with_leave_the_slow_node_is_left_at_a_step_boundary_given_back_and_avoided_without_charge(seed: int) -> None:
    job, steps = made(seed, 4, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 4, 60)
        steps.slow = {2: 2.0}
        assert await job.until(lambda: world(job) == ["n0", "n1", "n3"], 60), job.events[-5:]
        assert await job.until(lambda: job.queue.given_back == ["n2"], 30), job.events[-5:]
        await time_passes(job, 60)  # while Slurm and the site repeatedly report all nodes as healthy
        assert (len(events(job, "round")), events(job, "round")[-1]["restarts"]) == (2, 0)
        (leave,) = events(job, "leave")
        assert (leave["node"], leave["exclude"]) == ("n2", True), "which is a strike"
        assert (events(job, "lost"), events(job, "failure"), events(job, "stay")) == ([], [], [])

    job.run(story)


@pytest.mark.parametrize("seed", range(3))
def test_a_spare_takes_the_place_of_the_slow_node(seed: int) -> None:
    job, steps = made(seed, 4, min_nodes=3, max_nodes=3, spares=1, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        steps.slow = {1: 2.0}
        assert await job.until(lambda: world(job) == ["n0", "n2", "n3"], 60), job.events[-5:]
        await time_passes(job, 30)
        assert len(events(job, "leave")) == 1

    job.run(story)


@pytest.mark.parametrize("seed", range(3))
def test_below_min_the_slow_node_stays_until_a_joiner_has_come_in_its_place(seed: int) -> None:
    job, steps = made(seed, 3, min_nodes=3, grow=True, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        steps.slow = {2: 2.0}
        await time_passes(job, 90)
        assert (world(job), len(events(job, "round"))) == (["n0", "n1", "n2"], 1)
        assert [fields["node"] for fields in events(job, "stays")] == ["n2"]
        job.queue.set_free(1)
        assert await job.until(lambda: len(world(job)) == 3 and "n2" not in world(job), 90), job.events[-5:]
        assert events(job, "lost") == []

    job.run(story)


def test_a_node_that_is_fast_again_before_the_job_could_spare_it_stays() -> None:
    job, steps = made(1, 3, min_nodes=3, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        steps.slow = {2: 2.0}
        assert await job.until(lambda: bool(events(job, "stays")), 60)
        steps.slow = {}
        assert await job.until(lambda: bool(events(job, "stay")), 60)
        assert [fields["node"] for fields in events(job, "slow_over")] == ["n2"]
        assert (world(job), len(events(job, "round"))) == (["n0", "n1", "n2"], 1)

    job.run(story)


@pytest.mark.parametrize(("factor", "left"), [(1.7, False), (2.2, True)])
def test_the_slower_of_two_nodes_is_left_only_if_the_difference_is_clear(factor: float, *, left: bool) -> None:
    job, steps = made(2, 2, min_nodes=1, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 2, 60)
        steps.slow = {1: factor}
        await time_passes(job, 60)
        assert [fields["node"] for fields in events(job, "slow")] == ["n1"]
        assert (world(job) == ["n0"]) == left

    job.run(story)


def test_the_leader_of_a_job_may_be_slow_itself() -> None:
    job, steps = made(3, 4, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 4, 60)
        steps.slow = {0: 2.0}
        assert await job.until(lambda: bool(events(job, "leave")), 60)
        assert await job.until(lambda: events(job, "round")[-1]["nodes"] == ["n1", "n2", "n3"], 60), job.events[-5:]
        await time_passes(job, 30)
        assert (events(job, "lost"), job.verdict) == ([], None)

    job.run(story)


def test_another_leader_names_the_slow_node_too_and_the_story_shows_it_once() -> None:
    job, steps = made(4, 4, max_restarts=10)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 4, 60)
        steps.slow = {2: 2.0}
        assert await job.until(lambda: len(events(job, "slow")) == 1, 60)
        job.nodes[0].kill()
        assert await job.until(lambda: world(job) == ["n1", "n2", "n3"], 60)
        told = [{"time": when, "event": name, **fields} for when, _, name, fields in job.events]
        assert story_of(told).slow == {}
        assert await job.until(lambda: len(events(job, "slow")) == 2, 60)
        told = [{"time": when, "event": name, **fields} for when, _, name, fields in job.events]
        assert story_of(told).slow == {"n2": 2.0}
        assert len(story_of(told).was_slow) == 1

    job.run(story)


def test_with_off_no_leader_looks_for_slow_nodes() -> None:
    job, steps = made(5, 3, slow_factor=0.0, leaves_slow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        steps.slow = {2: 5.0}
        await time_passes(job, 60)
        assert (events(job, "slow"), world(job)) == ([], ["n0", "n1", "n2"])

    job.run(story)


def test_a_status_has_the_pace_only_of_measured_workers() -> None:
    status = Status(1, Host(1, "n1", ("10.0.0.1",), 1), 1)
    assert b"pace" not in encode(status)
    told = replace(status, pace=Pace(300, 0.025))
    assert decode_from_agent(encode(told)) == told
    assert len(encode(told)) - len(encode(status)) < 30
