"""Which jobs a job gives way to, how far it shrinks, and that it neither oscillates nor gives up nodes in vain."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import POLICY, Job

from elastic_hpc import slurm
from elastic_hpc.agent import giving_way
from elastic_hpc.agent.giving_way import GivingWay
from elastic_hpc.errors import SlurmError
from elastic_hpc.membership.yielding import (
    PATIENCE,
    Holding,
    NodeEntry,
    NodeKind,
    QueueEntry,
    Rule,
    Yielding,
    next_yielding,
)
from elastic_hpc.slurm import client, others

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import itertools

import _site

ANYBODY = Rule("pending", "", 600.0)
MAIN = NodeKind(frozenset({"main"}), frozenset({("gpu", 8)}), 64)
HOLDING = Holding("1", ("n4", "n3", "n2", "n1"), 0, 2, 4, ())
OTHER = QueueEntry(
    id="9",
    array="9",
    waits=True,
    user="bob",
    qos="normal",
    partitions=frozenset({"main"}),
    priority=100,
    least=1,
    cpus=1,
    nodes="",
    required="",
    demands=frozenset(),
    reason="Resources",
    is_joiner=False,
)
OWN = replace(OTHER, id="1", array="1", waits=False, user="ann", nodes="n[1-4]", least=4, reason="None")


class Watch:
    """A job on n1 to n4 with MIN 2 that gives way; it looks at the queue from time to time."""

    def __init__(self, rule: Rule = ANYBODY, holding: Holding = HOLDING, nodes: int = 4, **kinds: NodeKind) -> None:
        self.rule, self.holding, self.state = rule, holding, Yielding()
        self.kinds = {f"n{number}": MAIN for number in range(1, nodes + 1)} | kinds
        self.jobs: list[QueueEntry] = []
        self.free: set[str] = set()
        self.now = 0.0
        self.events: list[tuple[str, dict[str, Any]]] = []

    def look(self, *jobs: QueueEntry, free: str = "", later: float = 60.0) -> int | None:
        """Let the job look at ``jobs`` and the nodes ``free``. Returns the cap."""
        self.now += later
        nodes = [NodeEntry(name, name in free.split(), kind) for name, kind in self.kinds.items()]
        self.state, events = next_yielding(self.state, self.rule, self.holding, [OWN, *jobs], nodes, self.now)
        self.events += events
        return self.state.cap

    def give(self) -> None:
        """Give up the nodes beyond the cap."""
        assert self.state.cap
        self.holding = replace(self.holding, names=self.holding.names[-self.state.cap :])

    @property
    def outcomes(self) -> list[tuple[bool | None, str]]:
        return [(fields["started"], fields["reason"]) for name, fields in self.events if name == "yielded"]


def test_the_job_gives_up_as_many_nodes_as_the_first_waiting_job_needs() -> None:
    watch = Watch(nodes=6)
    assert watch.look(replace(OTHER, least=3), free="n5 n6") == 3
    assert watch.events == [
        ("yield", {"job": "9", "user": "bob", "given": 1, "kept": 3, "reason": "job 9 of bob waits for nodes"})
    ]


def test_a_waiting_job_that_needs_more_nodes_than_there_are_above_min_is_skipped() -> None:
    watch = Watch()
    large, small = replace(OTHER, id="8", array="8", least=3, priority=200), replace(OTHER, least=2)
    assert watch.look(large) is None
    assert watch.look(large, small) == 2
    assert watch.events[0][1]["job"] == "9"


@pytest.mark.parametrize(
    "job",
    [
        replace(OTHER, reason="Dependency"),
        replace(OTHER, reason="QOSMaxJobsPerUserLimit"),
        replace(OTHER, is_joiner=True),
        replace(OTHER, partitions=frozenset({"cpu"})),
        replace(OTHER, demands=frozenset({("gpu:h100", 8)})),
        replace(OTHER, demands=frozenset({("a100|h100", 1)})),
        replace(OTHER, required="n1"),
        replace(OTHER, cpus=3 * 64),
        replace(OTHER, waits=False, nodes="n7"),
    ],
    ids=["dependency", "limit", "joiner", "partition", "gres", "feature", "named-node", "cpus", "runs"],
)
def test_no_node_is_given_up_if_the_waiting_job_would_still_not_start(job: QueueEntry) -> None:
    watch = Watch()
    assert watch.look(job) in {None, 4}
    assert watch.events == []


@pytest.mark.parametrize(
    ("rule", "job"),
    [
        (Rule("qos", "urgent", 600.0), replace(OTHER, qos="urgent")),
        (Rule("partition", "high", 600.0), replace(OTHER, partitions=frozenset({"main", "high"}))),
        (Rule("user", "", 600.0), replace(OTHER, user="ann")),
    ],
)
def test_a_job_gives_way_only_to_the_jobs_that_its_user_selected(rule: Rule, job: QueueEntry) -> None:
    watch = Watch(rule)
    assert watch.look(OTHER) is None
    assert watch.look(job) == 3


def test_unsuitable_nodes_are_given_up_together_with_the_nodes_behind_them() -> None:
    watch = Watch(n4=NodeKind(frozenset({"scavenger"}), frozenset(), 64))
    assert watch.look(OTHER) == 2, "n4, a joiner of another partition, goes first"


def test_the_job_keeps_only_an_allowed_size_of_the_world() -> None:
    watch = Watch(holding=replace(HOLDING, sizes=(2, 4)))
    assert watch.look(OTHER) == 2


def test_the_job_grows_again_when_no_job_waits_and_the_next_gift_comes_after_yield_every() -> None:
    watch = Watch()
    assert watch.look(OTHER) == 3
    watch.give()
    running, second = replace(OTHER, waits=False, nodes="n4"), replace(OTHER, id="10", array="10")
    assert watch.look(running, second) == 3, "somebody waits: no growth, and no gift so soon"
    assert watch.outcomes == [(True, "it runs on n4")]
    assert watch.look(running) is None
    watch.holding = HOLDING
    assert watch.look(running, second) == 4, "a joiner would come before the other"
    assert watch.look(running, second, later=600 - 4 * 60 + 60) == 3
    assert len(watch.events) == 3


def test_one_task_of_an_array_starts_and_the_next_waits() -> None:
    watch = Watch()
    array = replace(OTHER, id="9_[0-3]")
    assert watch.look(array, replace(OTHER, id="9_9", waits=False, nodes="n7")) == 3
    watch.give()
    watch.look(array, replace(OTHER, id="9_9", waits=False, nodes="n7"))
    assert watch.outcomes == [], "another task ran before"
    watch.look(array, replace(OTHER, id="9_0", waits=False, nodes="n4"))
    assert watch.outcomes == [(True, "it runs on n4")]


def test_if_a_third_job_takes_the_nodes_it_is_named_and_the_next_gift_comes_later() -> None:
    watch = Watch()
    assert watch.look(OTHER) == 3
    watch.give()
    third = replace(OTHER, id="10", array="10", user="eve", waits=False, nodes="n[4,7]")
    assert watch.look(OTHER, third) == 3
    assert watch.outcomes == [(False, "job 10 of eve runs on n[4,7] instead")]
    assert watch.look(OTHER, third, later=601) == 3, "twice --yield-every"
    assert watch.look(OTHER, third, later=600) == 2


def test_a_job_that_does_not_start_on_the_given_nodes_gets_no_further_gifts() -> None:
    watch = Watch()
    assert watch.look(OTHER) == 3
    assert watch.look(OTHER, later=PATIENCE + 60) == 3, "the nodes are still in use: the workers save"
    watch.give()
    assert watch.look(OTHER, free="n4") == 3
    assert watch.look(OTHER, free="n4", later=PATIENCE + 1) is None
    assert watch.outcomes == [(False, "it has not started on the nodes that are left to it: Resources")]
    assert watch.look(OTHER, free="n4", later=1e5) is None
    assert watch.look(replace(OTHER, id="10", array="10"), later=1e5) == 2


def test_a_gift_ends_when_the_job_is_resized_and_needs_the_nodes_itself() -> None:
    watch = Watch()
    second = replace(OTHER, least=2)
    assert watch.look(second) == 2
    watch.holding = replace(HOLDING, least=3)
    assert watch.look(second) is None
    assert watch.outcomes == [(False, "this job needs 3 nodes by now")]
    assert watch.look(OTHER, second, later=601) == 3


def test_the_job_does_not_wait_for_a_cancelled_job() -> None:
    watch = Watch()
    assert watch.look(OTHER) == 3
    assert watch.look() is None
    assert watch.outcomes == [(None, "it is no longer in the queue")]


def test_the_return_of_own_nodes_does_not_count_as_growth() -> None:
    watch = Watch(holding=replace(HOLDING, names=("n3", "n2", "n1"), missing=1))
    assert watch.look(replace(OTHER, least=2)) == 4


# whole sites in simulated time


def elastic(id: int, submitted: float, size: int, least: int, most: int, hours: float = 10) -> _site.SiteJob:
    return _site.SiteJob(id, submitted, size, hours * 3600, 1e6, least, most, 1.0)


def rigid(id: int, submitted: float, size: int, minutes: float) -> _site.SiteJob:
    return elastic(id, submitted, size, size, size, minutes / 60)


def sizes(site: _site.Site, until: float, every: float = 30.0) -> list[tuple[int, ...]]:
    """The number of nodes of each running job, repeatedly."""
    seen = []
    for at in range(0, int(until), int(every)):
        site.run(at)
        seen.append(tuple(len(job.nodes) - job.leaving for job in sorted(site.running.values(), key=lambda j: j.id)))
    return seen


def changes(seen: list[tuple[int, ...]]) -> int:
    return sum(before != after for before, after in itertools.pairwise(seen))


def test_two_jobs_that_give_way_to_each_other_reach_a_stable_state() -> None:
    site = _site.Site([elastic(1, 0, 8, 2, 8), elastic(2, 1000, 8, 2, 8)], nodes=8)
    seen = sizes(site, 6 * 3600)
    assert seen[-1] == (6, 2)
    assert changes(seen) == 2, "the first gives up two nodes, with which the second starts"


def test_jobs_that_give_way_change_rarely_while_others_come_and_go() -> None:
    short = [rigid(id, 600 + 240 * id, 2, 2.5) for id in range(3, 63)]
    site = _site.Site([elastic(1, 0, 8, 2, 8), elastic(2, 100, 8, 2, 8), *short], nodes=8)
    sizes(site, 6 * 3600)
    assert {job.id for job in site.ended} >= {job.id for job in short}
    for job in site.running.values():
        assert job.gifts <= 1 + (240 * 63 + 600) / _site.RULE.every, "at most once in --yield-every"


def test_a_rigid_job_starts_soon_and_afterwards_the_elastic_job_gets_its_nodes_back() -> None:
    site = _site.Site([elastic(1, 0, 4, 2, 4), rigid(2, 1000, 2, 10)], nodes=4)
    seen = sizes(site, 3600)
    (other,) = site.ended
    assert other.started - other.submitted <= _site.POLL + _site.STANDSTILL
    assert seen[-1] == (4,)
    assert site.running[1].gifts == 1


# whole jobs in simulated time


class Crowd:
    """Rigid jobs in the Slurm of a simulated job, to which that job gives way."""

    def __init__(self, job: Job) -> None:
        self.job, self.jobs = job, list[QueueEntry]()
        job.outlooks = lambda record: [GivingWay(ANYBODY, "1", record.event).outlook]

    def submit(self, nodes: int, seconds: float) -> None:
        id = str(1000 + len(self.jobs))
        self.jobs.append(replace(OTHER, id=id, array=id, least=nodes))
        asyncio.get_running_loop().call_soon(self._start, len(self.jobs) - 1, seconds)

    def _start(self, number: int, seconds: float) -> None:
        """Start the job as soon as it has its nodes."""
        loop, queue, waiting = asyncio.get_running_loop(), self.job.queue, self.jobs[number]
        if queue.free < waiting.least:
            loop.call_later(1.0, self._start, number, seconds)
            return
        queue.set_free(queue.free - waiting.least)
        self.jobs[number] = replace(waiting, waits=False, nodes="elsewhere")
        loop.call_later(seconds, lambda: queue.set_free(queue.free + waiting.least))

    def all_jobs(self) -> list[QueueEntry]:
        return [OWN, *self.jobs]

    def all_nodes(self) -> list[NodeEntry]:
        held = [NodeEntry(node.host.name, is_free=False, kind=MAIN) for node in self.job.left]
        return held + [NodeEntry(f"free{number}", is_free=True, kind=MAIN) for number in range(self.job.queue.free)]


def crowded(seed: int, monkeypatch: pytest.MonkeyPatch, *, lets_shrink: bool = True) -> tuple[Job, Crowd]:
    async def at_once(call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    job = Job(seed, 4, replace(POLICY, free_growth=True, max_restarts=3), loss=0.0, scripts_listen=True)
    crowd = Crowd(job)
    monkeypatch.setattr(giving_way, "on_thread", at_once)
    monkeypatch.setattr(others, "all_jobs", crowd.all_jobs)
    monkeypatch.setattr(others, "all_nodes", crowd.all_nodes)
    monkeypatch.setattr(slurm, "lets_shrink", lambda: lets_shrink)
    return job, crowd


def worlds(job: Job) -> list[int]:
    return [len(fields["nodes"]) for _, _, name, fields in job.events if name == "round"]


@pytest.mark.parametrize("seed", range(5))
def test_a_whole_job_gives_nodes_to_another_and_takes_as_many_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job, crowd = crowded(seed, monkeypatch)

    async def story() -> None:
        assert await job.until(lambda: worlds(job) == [4] and job.training(), 60)
        crowd.submit(2, 300)
        assert await job.until(lambda: not crowd.jobs[0].waits, 100), job.events[-5:]
        assert worlds(job) == [4, 2]
        assert not job.queue.jobs, "no joiner waits before the other has its nodes"
        assert await job.until(lambda: worlds(job)[-1] == 4 and job.training(), 500), job.events[-5:]
        outcomes = [fields["started"] for _, _, name, fields in job.events if name == "yielded"]
        assert outcomes == [True]
        assert job.events[-1][3].get("restarts", 0) == 0, "nothing is charged"

    job.run(story)


@pytest.mark.parametrize("seed", range(5))
def test_a_leader_that_takes_over_gives_way_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job, crowd = crowded(seed, monkeypatch)

    async def story() -> None:
        assert await job.until(lambda: worlds(job) == [4] and job.training(), 60)
        job.nodes[0].power_off()
        assert await job.until(lambda: worlds(job)[-1] == 3 and job.training(), 60)
        crowd.submit(1, 30)
        assert await job.until(lambda: not crowd.jobs[0].waits, 300), job.events[-8:]
        job.queue.set_free(1)
        assert await job.until(lambda: worlds(job)[-1] == 4 and job.training(), 600), job.events[-8:]

    job.run(story)


def test_where_no_job_may_shrink_only_joiners_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    job, crowd = crowded(0, monkeypatch, lets_shrink=False)

    async def story() -> None:
        assert await job.until(lambda: worlds(job) == [4] and job.training(), 60)
        crowd.submit(2, 300)
        assert not await job.until(lambda: worlds(job) != [4], 200)
        assert "yield" not in [name for _, _, name, _ in job.events]

    job.run(story)
    watch = Watch(holding=replace(HOLDING, own=3, least=3))
    assert watch.look(replace(OTHER, least=2)) is None
    assert watch.look(OTHER) == 3, "n4 is a joiner's"


# Slurm's answers

JOBS = [
    "6|6|COMPLETED|ann|(null)|high|4294901754|cpu=2,node=1,billing=2|n2|n2|(null)|N/A|(null)|None|a;b",
    "2|2|PENDING|ann|normal|main,low|9|cpu=1,mem=4000M,node=2|||a100&ib|gres:gpu:a100:4|(null)|Resources|train",
    "5_[1-3]|5|PENDING|bob|(null)|main|7|cpu=16,mem=4000M,node=2|||(null)|N/A|weekly|Priority|join-4711_3",
]


def squeue(*command: str) -> str:
    """Answers like squeue: after each field comes the suffix that the format has after the colon."""
    formats = next(word for word in command if word.startswith("--Format=")).removeprefix("--Format=").split(",")
    ends = [form.partition(":")[2] for form in formats]
    return "".join("".join(value + end for value, end in zip(job.split("|"), ends, strict=True)) + "\n" for job in JOBS)


NODES = """\
n1;main*;idle~;a100,ib;gpu:a100:4(S:0-1),nvme:1;64
n1;high;idle~;a100,ib;gpu:a100:4(S:0-1),nvme:1;64
n2;main*;mix;(null);(null);2
"""


def test_the_queue_is_read_with_the_requests_of_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "run", squeue)
    ended, waiting, array = others.all_jobs()
    assert (ended.waits, ended.nodes, ended.required, ended.partitions) == (False, "n2", "n2", {"high"})
    assert (waiting.least, waiting.cpus, waiting.qos, waiting.reason) == (2, 1, "normal", "Resources")
    assert waiting.demands == {("a100", 1), ("ib", 1), ("gpu:a100", 4)}
    assert (array.array, array.least, array.cpus, array.is_joiner) == ("5", 2, 16, True)
    assert array.demands == {("reservation weekly", 1)}


def test_nodes_are_read_with_all_their_partitions_and_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "run", lambda *_: NODES)
    first, second = others.all_nodes()
    assert (first.is_free, first.kind.partitions, first.kind.cpus) == (True, {"main", "high"}, 64)
    assert first.kind.offers == {("a100", 1), ("ib", 1), ("gpu", 4), ("gpu:a100", 4), ("nvme", 1)}
    assert (second.is_free, second.kind.offers) == (False, frozenset())


def test_a_site_that_hides_its_nodes_does_not_count_as_having_no_free_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "run", lambda *_: "")
    with pytest.raises(SlurmError, match="shows no node"):
        others.all_nodes()
