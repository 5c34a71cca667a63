"""Whole jobs in simulated time whose nodes are drained: they leave the nodes before
the nodes fail, and lose nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import POLICY, Job, SimRecord

from elastic_hpc.agent.health import Health, Watcher
from elastic_hpc.agent.lookout import Outlook
from elastic_hpc.errors import SlurmError

SEEDS = st.integers(0, 2**32)
DRAINED = {"n2": "ECC errors"}


def events(job: Job, name: str) -> list[dict[str, Any]]:
    return [fields for _, _, event, fields in job.events if event == name]


def world(job: Job) -> list[str]:
    found = events(job, "round")
    return found[-1]["nodes"] if found and job.training() else []


class WatchedJob(Job):
    """A job whose leaders ask Slurm every ten seconds for drained nodes."""

    drained: dict[str, str] | None = {}  # noqa: RUF012 - replaced, never changed
    """Reasons of the drained nodes by name; None if Slurm does not answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.outlooks = self._outlooks

    def _outlooks(self, _record: SimRecord) -> list[Outlook]:
        return Health([Watcher("nodes", 10.0, self._ask)], None).outlooks

    async def _ask(self, names: set[str]) -> dict[str, str]:
        await asyncio.sleep(0.1)
        if self.drained is None:
            raise SlurmError("no answer")
        return {name: why for name, why in self.drained.items() if name in names}


def made(seed: int, size: int, **policy: Any) -> WatchedJob:
    policy = {"grow": False, "min_nodes": 2, "max_nodes": size, **policy}
    return WatchedJob(seed, size, replace(POLICY, **policy), loss=0.0, scripts_listen=True)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_job_leaves_a_drained_node_at_a_step_boundary_gives_it_back_and_loses_or_is_charged_nothing(
    seed: int,
) -> None:
    job = made(seed, 4)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 4, 60)
        job.drained = DRAINED
        assert await job.until(lambda: world(job) == ["n0", "n1", "n3"], 30), job.events[-5:]
        assert await job.until(lambda: job.queue.given_back == ["n2"], 30), job.events[-5:]
        await job.until(lambda: False, 60)
        assert (events(job, "lost"), events(job, "failure")) == ([], [])
        assert events(job, "round")[-1]["restarts"] == 0
        assert [fields["reason"] for fields in events(job, "leave")] == ["ECC errors"]
        assert (job.verdict, len(events(job, "round"))) == (None, 2)

    job.run(story)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_below_min_the_node_stays_until_a_joiner_has_come_in_its_place(seed: int) -> None:
    job = made(seed, 3, min_nodes=3, grow=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        job.drained = DRAINED
        await job.until(lambda: False, 60)
        assert (world(job), len(events(job, "round"))) == (["n0", "n1", "n2"], 1)
        assert [(fields["node"], fields["reason"]) for fields in events(job, "stays")] == [("n2", "ECC errors")]
        job.queue.set_free(1)
        assert await job.until(lambda: len(world(job)) == 3 and "n2" not in world(job), 60), job.events[-5:]
        assert events(job, "lost") == []

    job.run(story)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_job_leaves_one_of_two_bad_nodes_if_it_can_spare_only_one(seed: int) -> None:
    job = made(seed, 3)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        job.drained = {"n1": "fan", "n2": "ECC errors"}
        assert await job.until(lambda: len(world(job)) == 2, 60), job.events[-5:]
        await job.until(lambda: False, 60)
        assert (events(job, "lost"), len(events(job, "round")), len(world(job))) == ([], 2, 2)

    job.run(story)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_node_whose_drain_is_undone_stays(seed: int) -> None:
    job = made(seed, 3, min_nodes=3)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        job.drained = DRAINED
        assert await job.until(lambda: bool(events(job, "stays")), 60)
        job.drained = {}
        assert await job.until(lambda: [each["node"] for each in events(job, "stay")] == ["n2"], 60)
        await job.until(lambda: False, 60)
        assert len(events(job, "round")) == 1

    job.run(story)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_an_excluded_node_stays_out_under_the_next_leader_until_its_drain_is_undone(seed: int) -> None:
    job = made(seed, 5)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 5, 60)
        job.drained = DRAINED
        assert await job.until(lambda: "n2" not in world(job) and len(world(job)) == 4, 30), job.events[-5:]
        job.drained = None
        job.at[0].power_off()
        assert await job.until(lambda: world(job) == ["n1", "n3", "n4"], 60), job.events[-5:]
        await job.until(lambda: False, 60)
        assert events(job, "stay") == []
        job.drained = {}
        assert await job.until(lambda: [each["node"] for each in events(job, "stay")] == ["n2"], 60)

    job.run(story)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_a_slurm_that_does_not_answer_is_recorded_once_and_does_not_count_as_healthy(seed: int) -> None:
    job = made(seed, 3, min_nodes=3)

    async def story() -> None:
        job.drained = DRAINED
        assert await job.until(lambda: bool(events(job, "stays")), 60)
        for _ in range(2):
            job.drained = None
            await asyncio.sleep(60)
            assert events(job, "unseen") == [{"what": "nodes", "reason": "no answer"}] * (_ + 1)
            job.drained = DRAINED
            await asyncio.sleep(60)
        assert events(job, "stay") == []

    job.run(story)
