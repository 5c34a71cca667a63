"""Two nodes that cannot reach each other but reach all others: the job continues without one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Cluster, wait_for
from cut_links import Links
from on_demand import ON_DEMAND
from test_grow import Steady, Submit, steady  # noqa: F401 - fixtures
from test_resize import ask


@pytest.fixture
def links(fresh: Cluster) -> Iterator[Links]:
    made = Links(fresh)
    yield made
    made.heal()


@pytest.fixture
def training(steady: Callable[..., Steady]) -> Callable[..., Steady]:  # noqa: F811
    def do(nodes: str = "2:4", *options: str) -> Steady:
        job = steady("--exclusive", "--nodes", nodes, "--hang-timeout", "20", *options)
        job.wait_world(int(nodes.rpartition(":")[2]))
        return job

    return do


def last_world(job: Steady) -> list[str]:
    return list(job.job.events("round")[-1]["nodes"])


def steps(job: Steady) -> list[dict[str, Any]]:
    return job.job.lines(job.data / "steps.jsonl")


def wait_apart(job: Steady) -> list[list[str]]:
    return list(job.job.wait_event("apart", deadline=120)["pairs"])


@ON_DEMAND
def test_the_job_leaves_one_of_two_nodes_that_drop_each_others_packets_until_they_reach_each_other(
    training: Callable[..., Steady], links: Links
) -> None:
    job = training()
    links.cut("n2", "n3")
    links.cut("n3", "n2")
    assert wait_apart(job) == [["n2", "n3"]]
    job.wait_world(3)
    assert last_world(job) == ["n1", "n2", "n4"]
    for command in ("status", "why"):
        assert "n2 and n3 do not reach each other" in ask(job, command).stdout
    links.heal()
    job.wait_world(4)
    job.finish()
    assert [event["node"] for event in job.job.events("stay")] == ["n3"]
    assert job.job.events("lost") == []


@ON_DEMAND
@pytest.mark.parametrize(("here", "there"), [("n2", "n3"), ("n4", "n3")])
def test_a_node_is_left_also_if_only_one_direction_of_the_link_is_cut(
    training: Callable[..., Steady], links: Links, here: str, there: str
) -> None:
    job = training()
    links.cut(here, there)
    assert wait_apart(job) == [sorted([here, there])]
    job.wait_world(3)
    assert last_world(job) == [node for node in ("n1", "n2", "n3", "n4") if node != max(here, there)]
    job.finish()


@ON_DEMAND
def test_a_node_that_is_cut_off_from_two_others_is_left(training: Callable[..., Steady], links: Links) -> None:
    job = training()
    for one, other in (("n2", "n3"), ("n2", "n4")):
        links.cut(one, other)
        links.cut(other, one)
    assert wait_apart(job) == [["n2", "n3"], ["n2", "n4"]]
    job.wait_world(3)
    assert last_world(job) == ["n1", "n3", "n4"]
    job.finish()


@ON_DEMAND
def test_below_min_the_job_is_requeued_without_one_of_the_pair(training: Callable[..., Steady], links: Links) -> None:
    job = training("3:3")  # with 4:4 on four nodes no node could be excluded
    links.cut("n2", "n3")
    assert wait_apart(job) == [["n2", "n3"]]
    wait_for("the requeue", lambda: job.cluster.job_field(job.job.id, "Restarts") == "1", 180)
    assert "n2 and n3 do not reach each other" in job.job.verdict()["reason"]
    assert job.cluster.job_field(job.job.id, "ExcNodeList") == "n3"
    job.cluster.exec(["scancel", job.job.id])


@ON_DEMAND
def test_the_leader_excludes_a_node_that_it_cannot_reach(training: Callable[..., Steady], links: Links) -> None:
    job = training()
    links.cut("n1", "n3")
    links.cut("n3", "n1")
    job.wait_world(3)
    assert last_world(job) == ["n1", "n2", "n4"]
    job.finish()


@ON_DEMAND
def test_two_cut_links_at_once_one_of_them_with_the_leader_cost_one_node_each(
    training: Callable[..., Steady], links: Links
) -> None:
    job = training("1:4")
    for one, other in (("n1", "n4"), ("n2", "n3")):
        links.cut(one, other)
        links.cut(other, one)
    job.wait_world(2, 180)
    assert last_world(job) == ["n1", "n2"]
    job.finish()


@ON_DEMAND
def test_a_link_that_fails_repeatedly_for_a_few_seconds_costs_no_node(
    training: Callable[..., Steady], links: Links
) -> None:
    job = training()
    for away in (1, 3, 1, 3, 1, 3):
        links.cut("n2", "n3")
        time.sleep(away)  # less than --hang-timeout: TCP resends dropped packets
        links.heal()
        time.sleep(away)
    before = len(steps(job))
    wait_for("further steps", lambda: len(steps(job)) > before + 50)
    job.finish()
    assert (job.job.events("failure"), len(job.job.events("round"))) == ([], 1)
