"""The model behind giveway.py: jobs of published sizes and run times, and a site that runs them, event by event."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from elastic_hpc.membership.yielding import (
    Holding,
    NodeEntry,
    NodeKind,
    QueueEntry,
    Rule,
    Yielding,
    next_yielding,
)

NODES = 128
POLL, STANDSTILL, GROW_EVERY = 60.0, 10.0, 60.0
"""In seconds: the interval between two looks at the queue; the standstill of a job at each change of its world, which
is also the time until nodes that it gives up are free; the minimum interval between two growths.
"""
RULE = Rule("pending", "", 600.0)
"""``--yield-to pending`` with the default of ``--yield-every``."""

SERIAL, POWER_OF_2, LOW, MIDDLE, HIGH, FIRST = 0.244, 0.576, 0.8, 4.5, math.log2(NODES), 0.86
"""Sizes: the share of one-node jobs, and of jobs whose size is a power of two. The logarithm of a size is uniform in
each of two parts; the lower part has the share FIRST.
"""
SHORT, LONG, SLOPE, SHARE = (4.2, 0.94), (312.0, 0.03), -0.0054, 0.78
"""Run times: the logarithm follows one of two gamma distributions, the first with probability SLOPE * nodes + SHARE."""
LONGEST = 12.0
"""Logarithm of the longest run time in seconds."""
SOURCE = "Lublin and Feitelson, The workload on parallel supercomputers, J. Parallel Distrib. Comput. 63 (2003)"


@dataclass
class SiteJob:
    """A job of the simulated site. Times in seconds."""

    id: int
    submitted: float
    size: int
    """Number of nodes of the rigid job."""
    runtime: float
    """Run time with ``size`` nodes."""
    limit: float
    least: int
    most: int
    scaling: float
    """The speed is the number of nodes to the power of this number."""
    nodes: list[str] = field(default_factory=list)
    """The nodes that the job holds; it gives up the first one last."""
    started: float = -1.0
    ended: float = -1.0
    done: float = 0.0
    """Share of the work that is done."""
    since: float = 0.0
    """The moment up to which ``done`` counts; in the future while the job stands still."""
    leaving: int = 0
    """Number of nodes, the last ones, that the job is giving up."""
    grown: float = -math.inf
    version: int = 0
    """The version of the site at the job's last look, at ``looked``."""
    looked: float = 0.0
    yielding: Yielding = field(default_factory=Yielding)
    gifts: int = 0

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most

    @property
    def speed(self) -> float:
        return ((len(self.nodes) - self.leaving) / self.size) ** self.scaling / self.runtime

    def rigid(self) -> SiteJob:
        """The same job with a fixed size."""
        limit = self.limit * (self.least / self.size) ** self.scaling
        return replace(self, least=self.size, most=self.size, limit=limit)

    def advance(self, now: float) -> None:
        if now > self.since:
            self.done += (now - self.since) * self.speed
            self.since = now

    @property
    def end(self) -> float:
        return self.since + (1 - self.done) / self.speed


def workload(seed: int, count: int, load: float, share: float, scaling: float = 1.0) -> list[SiteJob]:
    """``count`` jobs that request ``load`` of the cluster. Of the jobs with at least two nodes and ten minutes,
    ``share`` are elastic, from half of their nodes to twice as many. The jobs are the same for any share.
    """
    dice = random.Random(seed)  # noqa: S311 - a model
    jobs = []
    for id in range(1, count + 1):
        size, runtime, factor, elastic = _size(dice), 0.0, dice.uniform(1, 3), dice.random() < share
        first = dice.random() < SLOPE * size + SHARE
        while not 0 < runtime <= LONGEST:
            runtime = dice.gammavariate(*(SHORT if first else LONG))
        runtime = math.exp(runtime)
        least = most = size
        if elastic and size > 1 and runtime >= 600:
            least, most = math.ceil(size / 2), min(NODES, 2 * size)
        limit = factor * runtime * (size / least) ** scaling
        jobs.append(SiteJob(id, dice.random(), size, runtime, limit, least, most, scaling))
    span = sum(job.size * job.runtime for job in jobs) / (load * NODES)
    jobs.sort(key=lambda job: job.submitted)
    return [replace(job, id=id, submitted=job.submitted * span) for id, job in enumerate(jobs, 1)]


def _size(dice: random.Random) -> int:
    kind = dice.random()
    if kind <= SERIAL:
        return 1
    low, high = (LOW, MIDDLE) if dice.random() <= FIRST else (MIDDLE, HIGH)
    power = dice.uniform(low, high)
    return round(2 ** (round(power) if kind <= SERIAL + POWER_OF_2 else power))


class Site:
    """The cluster with its queue, from event to event."""

    def __init__(self, jobs: Sequence[SiteJob], nodes: int = NODES, rule: Rule | None = RULE) -> None:
        """``rule``: how elastic jobs give way; None if they keep what they have, and grow whenever they can."""
        self.now = 0.0
        self.queue: list[SiteJob] = []
        self.running: dict[int, SiteJob] = {}
        self.ended: list[SiteJob] = []
        self.free = [f"n{node}" for node in range(nodes, 0, -1)]
        self.used = 0.0
        """Node-seconds that jobs have held so far."""
        self._rule, self._size = rule, nodes
        kind = NodeKind(frozenset({"main"}), frozenset(), 1)
        self._entries = {name: [NodeEntry(name, is_free, kind) for is_free in (False, True)] for name in self.free}
        self._version = 0
        """Rises with each change of the queue or of the nodes that jobs hold."""
        self._shown: tuple[list[QueueEntry], list[NodeEntry]] = [], []
        self._shown_version = -1
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, SiteJob]] = []
        for job in jobs:
            self._later(job.submitted, "submit", job)

    def run(self, until: float = math.inf) -> None:
        while self._events and self._events[0][0] <= until:
            at, _, what, job = heapq.heappop(self._events)
            self.used += (at - self.now) * (self._size - len(self.free))
            self.now = at
            getattr(self, f"_{what}")(job)

    def _later(self, at: float, what: str, job: SiteJob) -> None:
        heapq.heappush(self._events, (at, next(self._order), what, job))

    # events

    def _submit(self, job: SiteJob) -> None:
        self.queue.append(job)
        self._schedule()

    def _end(self, job: SiteJob) -> None:
        if job.id in self.running and job.end <= self.now + 1e-6:  # otherwise the job has changed its size since
            job.ended = self.now
            del self.running[job.id]
            self.ended.append(job)
            self.free += job.nodes
            self._schedule()

    def _left(self, job: SiteJob) -> None:
        """The nodes that the job gives up are free."""
        if job.id in self.running:
            kept = len(job.nodes) - job.leaving
            self.free += job.nodes[kept:]
            job.nodes, job.leaving = job.nodes[:kept], 0
            self._schedule()

    def _grow(self, _job: SiteJob) -> None:
        self._schedule()

    def _look(self, job: SiteJob) -> None:
        """The job looks at the queue and gives way."""
        if job.id not in self.running or self._rule is None:
            return
        self._later(self.now + POLL, "look", job)
        before = job.yielding
        waits_only = before.gift is None and not job.looked < before.next_at <= self.now
        if waits_only and (job.version == self._version or (before.cap is None and not self.queue)):
            return
        job.version, job.looked = self._version, self.now
        job.yielding, events = next_yielding(before, self._rule, self._holding(job), *self._seen(), self.now)
        job.gifts += sum(name == "yield" for name, _ in events)
        if job.yielding.cap is not None and job.yielding.cap < len(job.nodes) - job.leaving:
            self._change(job, leaving=len(job.nodes) - job.yielding.cap)
            self._later(self.now + STANDSTILL, "left", job)
        elif before.cap is not None and job.yielding.cap is None:
            self._schedule()

    def _holding(self, job: SiteJob) -> Holding:
        return Holding(str(job.id), tuple(reversed(job.nodes)), 0, job.least, job.most, ())

    def _seen(self) -> tuple[list[QueueEntry], list[NodeEntry]]:
        """The jobs and nodes that Slurm shows. It forgets the older ones of the jobs that have ended."""
        if self._shown_version != self._version:
            jobs = [_entry(job) for job in (*self.queue, *self.running.values(), *self.ended[-20:])]
            free = set(self.free)
            self._shown = jobs, [entries[name in free] for name, entries in self._entries.items()]
            self._shown_version = self._version
        return self._shown

    # the scheduler

    def _schedule(self) -> None:
        """First come, first served; later jobs start if they do not delay the first waiting job."""
        self._version += 1
        while self.queue and self.queue[0].least <= len(self.free):
            job = self.queue.pop(0)
            self._start(job, min(job.most, len(self.free)))
        ends, extra = self._reservation()
        for job in list(self.queue[1:]):
            room = len(self.free) if self.now + job.limit <= ends else min(extra, len(self.free))
            if job.least <= room:
                count = min(job.most, room)
                extra -= count if self.now + job.limit > ends else 0
                self.queue.remove(job)
                self._start(job, count)
        for job in self.running.values():
            room = len(self.free) if job.started + job.limit <= ends else min(extra, len(self.free))
            more = min(room, job.most - len(job.nodes))
            if not job.is_elastic or job.leaving or more <= 0 or job.yielding.cap is not None:
                continue
            if self.now < job.grown + GROW_EVERY:
                self._later(job.grown + GROW_EVERY, "grow", job)
                continue
            extra -= more if job.started + job.limit > ends else 0
            job.grown = self.now
            self._change(job, more=more)

    def _reservation(self) -> tuple[float, int]:
        """The latest start of the first waiting job, and the number of nodes that it then leaves free."""
        if not self.queue:
            return math.inf, 0
        there = len(self.free)
        for job in sorted(self.running.values(), key=lambda job: job.started + job.limit):
            there += len(job.nodes)
            if there >= self.queue[0].least:
                return job.started + job.limit, there - self.queue[0].least
        raise AssertionError("a job asks for more nodes than there are")

    def _start(self, job: SiteJob, count: int) -> None:
        job.started = job.since = self.now
        job.nodes = [self.free.pop() for _ in range(count)]
        self.running[job.id] = job
        self._later(job.end, "end", job)
        if job.is_elastic:
            self._later(self.now + POLL, "look", job)

    def _change(self, job: SiteJob, more: int = 0, leaving: int = 0) -> None:
        job.advance(self.now)
        job.nodes += [self.free.pop() for _ in range(more)]
        job.leaving = leaving
        job.since = max(job.since, self.now + STANDSTILL)
        self._version += 1
        self._later(job.end, "end", job)


def _entry(job: SiteJob) -> QueueEntry:
    waits = job.started < 0
    return QueueEntry(
        id=str(job.id),
        array=str(job.id),
        waits=waits,
        user=f"user{job.id}",
        qos="",
        partitions=frozenset({"main"}),
        priority=-job.id,
        least=job.least,
        cpus=1,
        nodes=",".join(job.nodes),
        required="",
        demands=frozenset(),
        reason="Resources" if waits else "None",
        is_joiner=False,
    )
