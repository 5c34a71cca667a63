"""The blame for a repeated failure: the script or a node."""

from __future__ import annotations

from typing import Any

import pytest
from test_leader import Job, failure, formed, orders

from elastic_hpc.membership.causes import signature
from elastic_hpc.membership.messages import Failure
from elastic_hpc.membership.nodes import joiner
from elastic_hpc.membership.strikes import Strike, dump, excluded, load
from elastic_hpc.membership.world import OTHERS

CUDA = "RuntimeError: CUDA error: unspecified launch failure"
BUG = "ValueError: no such data set"


def error(node: int, message: str = CUDA, **fields: Any) -> Failure:
    return failure(node, message, **{"kind": "exception", **fields})


def trained(*, granted: int = 4, **changes: Any) -> Job:
    """Round 1 runs on the first ``max_nodes`` of ``granted`` nodes."""
    return formed(granted, **{"min_nodes": 3, "max_nodes": 3, "grow": False, "can_requeue": False, **changes})


def fail_twice(job: Job, node: int, message: str = CUDA, nodes: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """The workers of ``node``, and no others, fail twice."""
    job.fail(node, error(node, message))
    job.ready(*nodes)
    job.fail(node, error(node, message))
    job.wait(OTHERS + 0.1)


def members(job: Job) -> tuple[int, ...]:
    return job.leader.roster.members


def test_a_spare_takes_the_place_of_the_node_that_fails_again() -> None:
    job = trained()
    assert members(job) == (0, 1, 2)
    fail_twice(job, 1)
    assert job.verdict is None
    (barred,) = job.events("barred")
    assert barred["node"] == "n1"
    assert "CUDA error: unspecified launch failure; the same failure on the same node" in barred["reason"]
    job.ready(0, 1, 2, 3)
    assert members(job) == (0, 2, 3)
    assert job.leader.restarts == 2
    assert orders(job.leader.take_orders(beat=True))[1].plan is None, "it stays in touch, and votes"


def test_a_smaller_world_continues_without_the_node_that_fails_again() -> None:
    job = trained(granted=3, min_nodes=2)
    fail_twice(job, 1, nodes=(0, 1, 2))
    job.ready(0, 1, 2)
    assert members(job) == (0, 2)


def test_a_joiner_takes_the_place_of_the_node_that_fails_again() -> None:
    job = trained(granted=3, grow=True)
    fail_twice(job, 1, nodes=(0, 1, 2))
    assert job.verdict is None
    assert job.leader.needs.nodes == 1
    assert "n1" in job.leader.needs.names
    new = joiner("17")
    job.ready(0, 1, 2, new)
    assert members(job) == (0, 2, new)


def test_if_no_joiner_comes_the_job_is_requeued() -> None:
    job = trained(granted=3, grow=True, can_requeue=True)
    fail_twice(job, 1, nodes=(0, 1, 2))
    job.ready(0, 1, 2)
    job.wait(60.0)
    assert job.verdict.outcome == "requeue"
    assert "2 nodes are left, fewer than MIN 3; 1 more stay out" in job.verdict.reason


def test_a_joiner_that_fails_again_is_released_and_may_not_come_back() -> None:
    new = joiner("17")
    job = trained(granted=2, min_nodes=2, grow=True, grow_every=0.0)
    job.lose(1, "gone")
    job.ready(0, new)
    assert members(job) == (0, new)
    name = f"n{new}"
    for _ in range(2):
        job.fail(new, error(new))
        job.wait(OTHERS + 0.1)
        job.ready(0, new)
    assert [event["node"] for event in job.events("release")] == [name]
    job.say(new, conn=77)
    assert [event["node"] for event in job.events("refused")] == [name]


def test_the_leader_waits_until_the_workers_of_the_failed_node_are_gone() -> None:
    job = trained()
    fail_twice(job, 1)
    job.ready(0, 2, 3)
    assert members(job) == (0, 1, 2)
    job.ready(1)
    assert members(job) == (0, 2, 3)


@pytest.mark.parametrize(("can_requeue", "outcome"), [(True, "requeue"), (False, "failed")])
def test_without_another_node_the_job_is_requeued_and_avoids_the_failed_node(can_requeue: Any, outcome: str) -> None:
    job = trained(granted=3, can_requeue=can_requeue)
    fail_twice(job, 1, nodes=(0, 1, 2))
    assert job.verdict.outcome == outcome
    assert job.verdict.cause == "exception"
    assert "CUDA error: unspecified launch failure; the same failure on the same node" in job.verdict.reason
    assert ("cannot be requeued" in job.verdict.reason) == (not can_requeue)
    assert [event["node"] for event in job.events("barred")] == ["n1"] * can_requeue


def test_the_script_is_blamed_for_a_failure_on_all_nodes_even_if_the_same_node_reports_it_first() -> None:
    job = trained()
    job.fail(0, error(0, BUG))
    job.ready(0, 1, 2, 3)
    job.fail(0, error(0, BUG))
    assert job.verdict is None
    job.fail(2, error(2, BUG))
    assert job.verdict.outcome == "failed"
    assert f"{BUG}; the same failure as before, without progress in between" in job.verdict.reason
    assert job.leader.restarts == 1


def test_the_script_is_blamed_for_a_failure_on_rank_0_on_any_node() -> None:
    job = trained()
    fail_twice(job, 0, BUG)
    job.ready(0, 1, 2, 3)
    assert members(job) == (1, 2, 3)
    job.fail(1, error(1, BUG))
    assert job.verdict.outcome == "failed"
    assert "the same failure as before" in job.verdict.reason
    assert job.leader.restarts == 2


def test_blaming_an_innocent_node_costs_one_requeue_then_the_script_is_blamed() -> None:
    job = trained(granted=3, can_requeue=True)
    fail_twice(job, 0, BUG, nodes=(0, 1, 2))
    assert job.verdict.outcome == "requeue"
    (barred,) = job.events("barred")
    strike = Strike(barred["node"], 0.0, barred["reason"], barred["signature"], barred["step"])
    assert excluded([strike], 1.0, {"n0", "n1", "n2", "n3"}, 3) == ("n0",)
    after = trained(granted=3, can_requeue=True, strikes=load(dump([strike])))
    after.fail(1, error(1, BUG))
    assert after.verdict.outcome == "failed"


def test_progress_acquits_the_nodes_of_the_previous_run() -> None:
    job = trained(strikes=[Strike("n0", 0.0, "", signature("exception", BUG), 5)])
    job.fail(1, error(1, BUG), step=6)
    assert job.verdict is None


@pytest.mark.parametrize(("message", "outcome"), [(CUDA, "requeue"), (BUG, "failed")])
def test_a_node_that_is_alone_is_blamed_only_for_failures_that_scripts_rarely_cause(message: str, outcome: str) -> None:
    job = trained(granted=1, min_nodes=1, max_nodes=1, can_requeue=True)
    fail_twice(job, 0, message, nodes=(0,))
    assert job.verdict.outcome == outcome


def test_a_node_that_fails_in_different_ways_is_excluded_too() -> None:
    job = trained()
    for message in (CUDA, "RuntimeError: cuDNN error", "OSError: [Errno 5] Input/output error"):
        job.fail(1, error(1, message))
        job.wait(OTHERS + 0.1)
        job.ready(0, 1, 2, 3)
    assert members(job) == (0, 2, 3)
    assert job.verdict is None


@pytest.mark.parametrize(("message", "world"), [(CUDA, (0, 2, 3)), (BUG, (0, 1, 2))])
def test_progress_does_not_acquit_the_only_node_whose_machine_fails(message: str, world: tuple[int, ...]) -> None:
    job = trained()
    for step in (10, 20, 30):
        assert members(job) == (0, 1, 2)
        job.fail(1, error(1, message), step=step)
        job.wait(OTHERS + 0.1)
        job.ready(0, 1, 2, 3)
    assert members(job) == world
    assert "without progress" not in str(job.events("barred"))


def test_nodes_whose_machines_fail_in_turn_are_not_excluded() -> None:
    job = trained()
    for step, node in enumerate((1, 1, 0, 1, 1, 2)):
        job.fail(node, error(node), step=10 * step)
        job.wait(OTHERS + 0.1)
        job.ready(0, 1, 2, 3)
    assert members(job) == (0, 1, 2)


def test_a_node_whose_workers_are_killed_repeatedly_is_excluded_if_others_can_continue() -> None:
    for granted, world in ((4, (0, 2, 3)), (3, (0, 1, 2))):
        job = trained(granted=granted, can_requeue=True)
        for _ in range(3):
            job.fail(1, failure(1, "killed by SIGSEGV", kind="signal", exitcode=-11))
            job.wait(OTHERS + 0.1)
            job.ready(*range(granted))
        assert members(job) == world
        assert job.verdict is None


def test_a_node_is_not_blamed_when_a_user_kills_its_workers() -> None:
    job = trained()
    for _ in range(5):
        job.fail(1, failure(1, "killed by SIGKILL", kind="signal", exitcode=-9))
        job.wait(OTHERS + 0.1)
        job.ready(0, 1, 2, 3)
    assert members(job) == (0, 1, 2)


def test_neither_the_script_nor_a_node_is_blamed_for_a_hang() -> None:
    job = trained()
    for _ in range(2):
        job.fail(1, failure(1, "no step for 60 s", kind="hang"))
        job.reach(0, 1, 2)
        job.ready(0, 1, 2, 3)
    assert job.verdict.outcome == "failed"


def test_an_echo_does_not_hide_the_node_that_failed() -> None:
    job = trained()
    job.fail(1, error(1))
    job.ready(0, 1, 2, 3)
    job.fail(0, error(0, "connection closed by peer", collateral=True))
    job.fail(1, error(1))
    job.fail(2, error(2, "connection closed by peer", collateral=True))
    job.wait(OTHERS + 0.1)
    job.ready(0, 1, 2, 3)
    assert members(job) == (0, 2, 3)


def test_the_budget_of_restarts_is_respected() -> None:
    job = trained(max_restarts=1)
    fail_twice(job, 1)
    assert job.verdict.cause == "budget"
    assert job.events("barred") == []


def test_the_next_leader_excludes_the_node_too() -> None:
    job = trained()
    fail_twice(job, 1)
    job.ready(0, 1, 2, 3)
    after = Job(inherited=job.leader.roster, min_nodes=2, max_nodes=3)
    for node in (0, 1, 2, 3):
        after.say(node, round=0, roster=2, seen=2)
    after.wait(1.0)
    after.ready(0, 1, 2, 3)
    assert members(after) == (0, 2, 3)


def test_failures_that_differ_only_in_the_name_of_the_node_are_the_same() -> None:
    assert signature("exit", "gpu-a: no space", "gpu-a") == signature("exit", "gpu-b: no space", "gpu-b")
    assert signature("exit", "data-1 is bad", "a") != signature("exit", "datb-1 is bad", "b")


# failures in the table of known causes

ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
MODULE = "ModuleNotFoundError: No module named 'einops'"
SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x10 and 20x5)"


def test_a_node_that_is_known_to_be_at_fault_is_excluded_immediately() -> None:
    job = trained()
    job.fail(1, error(1, ECC))
    assert job.verdict is None
    (barred,) = job.events("barred")
    assert barred["node"] == "n1"
    assert "the fault of that node: the GPU's memory is damaged" in barred["reason"]
    job.ready(0, 1, 2, 3)
    assert members(job) == (0, 2, 3)


def test_the_job_excludes_one_node_after_another_and_continues_while_others_are_there() -> None:
    job = trained(granted=5)
    for node, world in ((1, (0, 2, 3)), (2, (0, 3, 4))):
        job.fail(node, error(node, ECC))
        job.ready(*range(5))
        assert members(job) == world
    assert job.verdict is None


@pytest.mark.parametrize(("can_requeue", "outcome"), [(True, "requeue"), (False, "failed")])
def test_without_another_node_a_node_at_fault_gets_one_more_chance(can_requeue: Any, outcome: str) -> None:
    job = trained(granted=3, can_requeue=can_requeue)
    job.fail(1, error(1, ECC))
    assert job.verdict is None
    job.ready(0, 1, 2)
    job.fail(1, error(1, ECC))
    assert job.verdict.outcome == outcome


@pytest.mark.parametrize(("message", "others"), [(SHAPES, False), (MODULE, True)])
def test_a_fault_of_the_script_ends_a_job_without_progress_immediately(message: str, *, others: bool) -> None:
    job = trained()
    job.fail(1, error(1, message))
    if others:
        assert job.verdict is None
        job.fail(2, error(2, message))
    assert job.verdict.outcome == "failed"
    assert "a restart cannot fix that, and no progress was made: " in job.verdict.reason
    assert job.leader.restarts == 0


def test_a_module_that_is_missing_on_one_node_alone_does_not_end_the_job() -> None:
    job = trained()
    for _ in range(2):
        job.fail(1, error(1, MODULE))
        job.wait(OTHERS + 0.1)
        job.ready(0, 1, 2, 3)
    assert job.verdict is None
    assert members(job) == (0, 2, 3)


def test_after_progress_a_fault_of_the_script_leads_to_one_more_attempt() -> None:
    job = trained()
    job.fail(1, error(1, SHAPES), step=7)
    assert job.verdict is None
    job.ready(0, 1, 2, 3)
    job.fail(2, error(2, SHAPES), step=7)
    assert job.verdict.outcome == "failed"


def test_no_node_is_excluded_for_a_full_shared_disk_even_if_only_one_rank_writes() -> None:
    job = trained()
    fail_twice(job, 1, "OSError: [Errno 28] No space left on device: '/work/me/ckpt.pt'")
    assert job.verdict.outcome == "failed"
    assert job.events("barred") == []
