"""Two nodes that cannot reach each other while their agents reach the leader: the job finds, names and excludes one."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import POLICY, Job

from elastic_hpc.membership.links import fewest, partners, sentence_of
from elastic_hpc.membership.messages import Status, decode_from_agent, encode
from elastic_hpc.membership.nodes import FIRST_JOINER
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Network
from elastic_hpc.network.identity import Identity

WIDE = replace(POLICY, max_nodes=8, grow=False)
PAIRS = st.frozensets(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda pair: pair[0] < pair[1]), min_size=1, max_size=12
)


# which nodes to probe, and which to exclude


@pytest.mark.parametrize("size", [2, 3, 4, 7, 64, 65])
def test_each_node_probes_all_others_and_has_one_partner_at_a_time(size: int) -> None:
    nodes = [3 * node for node in range(size)]
    orders = {node: partners(node, nodes) for node in nodes}
    assert all(sorted([node, *order]) == nodes for node, order in orders.items())
    if size % 2 == 0:
        for turn in range(size - 1):
            assert all(orders[order[turn]][turn] == node for node, order in orders.items())


@given(PAIRS)
@settings(max_examples=100, deadline=None)
def test_the_fewest_nodes_are_excluded_that_break_all_pairs(pairs: frozenset[tuple[int, int]]) -> None:
    def covers(nodes: Any) -> bool:
        return all(set(pair) & set(nodes) for pair in pairs)

    found = fewest(pairs, 0)
    assert covers(found)
    assert not any(covers(nodes) for nodes in itertools.combinations(range(7), len(found) - 1))
    if 0 in found:  # the leader is chosen only if no other choice is as small
        assert not any(covers(nodes) for nodes in itertools.combinations(range(1, 7), len(found)))


@given(st.integers(20, 200), st.integers(0, 19))
def test_of_many_pairs_the_common_node_is_excluded(size: int, bad: int) -> None:
    pairs = {(min(bad, node), max(bad, node)) for node in range(size) if node != bad}
    assert fewest(pairs, 0) == (bad,)


def test_a_joiner_is_excluded_before_a_voting_node_and_the_batch_host_and_the_leader_come_last() -> None:
    assert fewest([(1, FIRST_JOINER + 7)], 0) == (FIRST_JOINER + 7,)
    assert fewest([(1, 2)], 1) == (2,)
    assert fewest([(1, 2)], 2) == (1,)
    assert fewest([(0, 2)], 1) == (2,)
    assert fewest([(0, 2)], 2) == (0,)


def test_a_sentence_names_a_few_pairs() -> None:
    names = {node: f"n{node}" for node in range(9)}
    assert sentence_of([(2, 3)], names) == "n2 and n3 do not reach each other"
    many = [(1, node) for node in range(2, 9)]
    assert sentence_of(many, names).endswith("n1 and n5 do not reach each other (and 3 more pairs)")


def test_a_status_without_a_probe_has_no_probe_fields() -> None:
    status = Status(1, Host(1, "n1", ("10.0.0.1",), 1), 1)
    assert b"probed" not in encode(status)
    assert b"unreached" not in encode(status)
    answer = replace(status, probed=3, unreached="2,5-7")
    assert decode_from_agent(encode(answer)) == answer


# whole jobs


def said(job: Job, name: str) -> list[dict[str, Any]]:
    return [fields for _, _, event, fields in job.events if event == name]


def hang(job: Job, node: int, step: int = 5) -> None:
    job.nodes[node].end_workers(failed=True, kind="hang", message="nothing heard for 15 s (--hang-timeout)", step=step)


def last_world(job: Job) -> list[str]:
    return list(said(job, "round")[-1]["nodes"])


async def hangs_as_long_as_apart(job: Job, *pairs: tuple[int, int]) -> None:
    """As in production, the workers of a world hang if two of its nodes do not reach each other."""
    while True:
        members = {node.index for node in job.nodes if node.workers.alive}
        cut = [pair for pair in pairs if set(pair) <= members and (frozenset(pair) in job.cuts or job.one_way)]
        if cut:
            hang(job, cut[0][0])
        await asyncio.sleep(4)


@pytest.mark.parametrize("how", ["both ways", "one way", "the other way"])
@given(st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_the_job_continues_without_one_of_a_pair_until_the_pair_has_healed(how: str, seed: int) -> None:
    job = Job(seed, 4, WIDE, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        if how == "both ways":
            job.cuts = {frozenset((1, 2))}
        else:
            job.one_way = {(1, 2) if how == "one way" else (2, 1)}
        job.nodes[0].spawn(hangs_as_long_as_apart(job, (1, 2)))
        assert await job.until(lambda: last_world(job) == ["n0", "n1", "n3"], 60), job.events[-8:]
        (apart,) = said(job, "apart")
        assert apart["pairs"] == [["n1", "n2"]]
        assert "n1 and n2 do not reach each other" in said(job, "restart")[-1]["reason"]
        assert [(leave["node"], leave["reason"]) for leave in said(job, "leave")] == [("n2", apart["reason"])]
        await asyncio.sleep(60)
        assert last_world(job) == ["n0", "n1", "n3"], "it stays out as long as the pair is apart"
        job.heal()
        assert await job.until(lambda: len(last_world(job)) == 4, 200), job.events[-8:]
        assert [stay["node"] for stay in said(job, "stay")] == ["n2"]
        assert len(said(job, "apart")) == 1
        assert not job.over()

    job.run(story)


def apart(job: Job) -> list[tuple[int, int]]:
    """The pairs in the training world whose nodes do not reach each other."""
    members = sorted(node.index for node in job.nodes if node.workers.alive)
    both = lambda a, b: job.connected(job.at[a], job.at[b]) and job.connected(job.at[b], job.at[a])  # noqa: E731
    return [pair for pair in itertools.combinations(members, 2) if not both(*pair)]


async def hangs_15_s_after_a_cut(job: Job) -> None:
    """As in production, a cut that heals sooner is only a delay, and the workers do steps whenever no pair is apart."""
    since, step = dict[tuple[int, int], float](), 10
    while True:
        now_apart = apart(job)
        since = {pair: since.get(pair, job.now) for pair in now_apart}
        step += not now_apart
        if any(job.now - begun >= 15 for begun in since.values()) and not job.over():
            hang(job, job.random.choice(now_apart)[0], step)
            since = {}
        await asyncio.sleep(1)


@given(st.integers(0, 2**32), st.integers(4, 6), st.sampled_from([0, 1, 5]))
@settings(max_examples=4, deadline=None)
def test_whatever_links_fail_for_however_long_the_job_continues_and_is_whole_afterwards(
    seed: int, size: int, flaps: int
) -> None:
    """One or two pairs at a time, in one direction or in both, with or without the leader, also while nodes are on
    trial; then the cut stays for a while.
    """
    job = Job(seed, size, replace(WIDE, max_nodes=size), loss=0.0)

    def cut() -> None:
        for _ in range(job.random.choice([1, 2])):
            pair = tuple(job.random.sample(range(size), 2))
            if job.random.random() < 0.5:
                job.cuts.add(frozenset(pair))
            else:
                job.one_way.add((pair[0], pair[1]))

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.nodes[0].spawn(hangs_15_s_after_a_cut(job))
        for _ in range(flaps):
            cut()
            await asyncio.sleep(job.random.choice([3, 17, 60]))
            job.heal()
            await asyncio.sleep(job.random.choice([1, 5, 30]))
        cut()
        await asyncio.sleep(150)
        assert await job.until(lambda: not apart(job) and sum(node.workers.alive for node in job.nodes) >= 2, 100)
        job.heal()
        whole = lambda: len(last_world(job)) == size and job.training()  # noqa: E731
        assert await job.until(whole, 2500) or flaps > 1, job.events[
            -8:
        ]  # a node that was excluded three times stays out
        assert not job.over()

    job.run(story)


def test_two_pairs_cost_two_nodes_and_a_star_costs_one() -> None:
    for cuts, left in (
        (((1, 2), (3, 4)), ["n0", "n1", "n3", "n5"]),
        (((1, 2), (2, 4)), ["n0", "n1", "n3", "n4", "n5"]),
    ):
        job = Job(1, 6, WIDE, loss=0.0)

        async def story(job: Job = job, cuts: Any = cuts, left: list[str] = left) -> None:
            assert await job.until(job.training, 60)
            job.cuts = {frozenset(pair) for pair in cuts}
            hang(job, 2)
            assert await job.until(lambda: last_world(job) == left, 30), job.events[-8:]
            assert [failure["first"] for failure in said(job, "failure")] == [True], "the answers are no failures"

        job.run(story)


def test_if_all_nodes_reach_each_other_the_script_is_blamed_for_a_hang_and_the_job_ends_as_before() -> None:
    job = Job(2, 4, replace(WIDE, can_requeue=False), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        hang(job, 2)
        assert await job.until(lambda: len(said(job, "round")) == 2 and job.training(), 30)
        hang(job, 2)
        assert await job.until(job.over, 30)
        assert job.verdict
        assert "the same failure as before" in job.verdict["reason"]
        assert said(job, "apart") == said(job, "leave") == []

    job.run(story)


@pytest.mark.parametrize(("least", "outcome"), [(4, "requeue"), (3, "")])
def test_below_min_a_node_stays_and_the_job_is_requeued_without_it(least: int, outcome: str) -> None:
    job = Job(3, 4, replace(WIDE, min_nodes=least), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.cuts = {frozenset((1, 2))}
        for formed in (2, 3):
            hang(job, 1)
            assert await job.until(lambda formed=formed: len(said(job, "round")) == formed or job.over(), 30)
            await asyncio.sleep(3)
        assert (job.verdict or {}).get("outcome", "") == outcome
        if outcome:
            assert job.verdict
            assert "n1 and n2 do not reach each other" in job.verdict["reason"]
            assert [stays["node"] for stays in said(job, "stays")] == ["n2"], "that is a strike"

    job.run(story)


def test_a_majority_of_the_nodes_is_never_excluded() -> None:
    job = Job(4, 5, replace(WIDE, min_nodes=1), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.cuts = {frozenset(pair) for pair in itertools.combinations(range(1, 5), 2)}
        hang(job, 1)
        assert await job.until(lambda: len(said(job, "round")) == 2, 60)
        assert len(last_world(job)) == 5
        assert len(said(job, "apart")[0]["pairs"]) == 6
        assert said(job, "leave") == []

    job.run(story)


def test_an_agent_that_does_not_answer_proves_nothing_and_the_leader_does_not_wait_long_for_it() -> None:
    job = Job(5, 4, WIDE, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        for node in (1, 2):
            job.nodes[node].membership._follower._prober = None  # an agent of another version
        job.cuts = {frozenset((1, 2))}
        hang(job, 3)
        assert await job.until(lambda: len(said(job, "round")) == 2, 30)
        assert last_world(job) == ["n0", "n1", "n2", "n3"]
        assert said(job, "apart") == []

    job.run(story)


def test_a_new_leader_knows_why_a_node_was_excluded_and_takes_it_back() -> None:
    job = Job(6, 5, WIDE, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.cuts = {frozenset((2, 3))}
        hang(job, 2)
        assert await job.until(lambda: last_world(job) == ["n0", "n1", "n2", "n4"], 30)
        job.nodes[0].kill()
        assert await job.until(lambda: last_world(job) == ["n1", "n2", "n4"], 30)
        await asyncio.sleep(40)
        assert last_world(job) == ["n1", "n2", "n4"]
        job.heal()
        assert await job.until(lambda: last_world(job) == ["n1", "n2", "n3", "n4"], 200)

    job.run(story)


def test_a_link_that_fails_repeatedly_does_not_use_up_the_restarts() -> None:
    job = Job(1, 4, replace(WIDE, max_restarts=10), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        for time in range(8):
            job.cuts = {frozenset((1, 2))}
            if job.training():
                hang(job, 1, step=time)
            await job.until(job.over, 60)
            assert last_world(job) == ["n0", "n1", "n3"]
            job.heal()
            await job.until(lambda: job.training() or job.over(), 700)
        assert not job.over()
        assert len(said(job, "stay")) == 2, "after the third time it stays out"
        job.nodes[1].power_off()
        assert await job.until(lambda: last_world(job) == ["n0", "n2", "n3"], 60), "the other of the pair is lost"

    job.run(story)


def test_an_excluded_node_returns_when_the_node_that_it_cannot_reach_is_lost() -> None:
    job = Job(7, 4, WIDE, loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.cuts = {frozenset((1, 2))}
        hang(job, 2)
        assert await job.until(lambda: last_world(job) == ["n0", "n1", "n3"], 30)
        job.nodes[1].power_off()
        assert await job.until(lambda: last_world(job) == ["n0", "n2", "n3"], 60), job.events[-8:]

    job.run(story)


# on sockets


def test_a_node_is_reached_at_the_nearest_address() -> None:
    hosts = ["192.168.7.20", "10.1.2.20", "172.16.0.20"]
    assert addresses.nearest(hosts, "10.1.2.30") == "10.1.2.20"
    assert addresses.nearest(hosts, "192.168.7.1") == "192.168.7.20"
    assert addresses.nearest(hosts, "127.0.0.1") in hosts


@pytest.mark.parametrize(
    ("named", "found"), [("lo", True), ("l", True), ("=lo", True), ("=l", False), ("^docker", False), ("", False)]
)
def test_the_interface_of_the_workers_is_written_as_nccl_reads_it(named: str, *, found: bool) -> None:
    assert addresses.of_workers(named) == ("127.0.0.1" if found else "")


def test_an_open_port_is_reached_even_if_its_process_is_slow_and_a_closed_port_is_not() -> None:
    listener = addresses.listen_from(43000)
    port = listener.getsockname()[1]

    async def look() -> list[bool]:
        network = Network([], Identity("job", 0, 0, "n0", "boot"), asyncio.sleep, 1.0)  # type: ignore[arg-type]
        before = await network.reaches(Host(1, "n1", ("127.0.0.1",), port), "127.0.0.1")
        listener.close()
        return [before, await network.reaches(Host(1, "n1", ("127.0.0.1",), port), "127.0.0.1")]

    assert asyncio.run(look()) == [True, False]
