"""Jobs whose nodes all publish an address that leads to the caller itself, such as that of Docker's bridge."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated import POLICY, Job
from simulated_network import OWN_ON_EVERY_NODE

SEEDS = (1, 2, 3)


def job_with_bridges(seed: int, size: int) -> Job:
    return Job(seed, size, replace(POLICY, max_nodes=size, grow=False), loss=0.0, bridges=OWN_ON_EVERY_NODE)


@pytest.mark.parametrize("seed", SEEDS)
def test_after_the_loss_of_two_nodes_another_node_takes_over_although_the_caller_itself_answers_at_their_addresses(
    seed: int,
) -> None:
    job = job_with_bridges(seed, 6)

    async def story() -> None:
        assert await job.until(job.training, 60), job.events[-5:]
        before, lost_at = job.trained, job.now
        for index in (0, 1):  # the leader, and the first in the order of succession
            job.at[index].power_off()
        assert await job.until(lambda: job.trained > before and job.training(), 60), job.events[-5:]
        assert job.now - lost_at < 30
        assert [node for _, node, name, _ in job.events if name == "take_over"] == [2]

    job.run(story)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_agent_is_restarted_although_the_leader_itself_answers_at_its_address(seed: int) -> None:
    job = job_with_bridges(seed, 3)
    job.queue.restarts = True

    async def story() -> None:
        for index in (2, 0):
            assert await job.until(job.training, 60), job.events[-5:]
            before = job.trained
            job.at[index].kill()
            assert await job.until(
                lambda before=before: len(job.left) == 3 and job.training() and job.trained > before, 60
            ), job.events[-5:]

    job.run(story)
