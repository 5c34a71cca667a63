"""When a job gives way to others: for whom it gives up nodes, how many, and when it may grow again. Pure.

Slurm has no handshake: another job may take nodes that were given up. So the job watches what happens to each gift, and
after gifts that helped no job, the next gift comes later.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastic_hpc.membership.nodes import name_matcher

PATIENCE = 300.0
"""Seconds for which released nodes are left to the job for which they were given up. Slurm looks at its whole queue
within minutes, and nodes may have an epilog.
"""

_MOST_DOUBLINGS = 4
"""Each gift that helped no job doubles the least time to the next gift, but at most this many times."""

_LACKING = re.compile("Resources|Priority|Nodes required for job are DOWN, DRAINED or reserved .*")
"""Slurm's reasons for waiting of jobs that more nodes could start. Slurm also gives the last reason to any job in a
partition if jobs of another partition wait for the same nodes.
"""


@dataclass(frozen=True)
class Rule:
    """To whom the job gives way."""

    to: str
    """``pending``, ``qos``, ``partition`` or ``user``; ``name`` names the QOS or partition."""
    name: str
    every: float
    """Least seconds from one gift to the next."""

    @classmethod
    def of(cls, text: str, every: float) -> Rule:
        """``text``: the value of ``--yield-to``, ``qos:urgent``."""
        to, _, name = text.partition(":")
        return cls(to, name, every)


@dataclass(frozen=True)
class QueueEntry:
    """A job that Slurm knows, or the waiting tasks of an array."""

    id: str
    """As squeue shows it: ``4711``, ``4711_3``, ``4711_[4-9]``."""
    array: str
    """4711 in each of these cases."""
    waits: bool
    user: str
    qos: str
    partitions: frozenset[str]
    priority: int
    least: int
    """The least number of nodes that it requests; ``cpus``: the least number of CPUs on all nodes."""
    cpus: int
    nodes: str
    """In Slurm's notation. Empty if the job has not started."""
    required: str
    """Nodes that it must have; empty if it may have any."""
    demands: frozenset[tuple[str, int]]
    """Features and generic resources that each of its nodes must have, and how many of them."""
    reason: str
    """Why it waits, in Slurm's words."""
    is_joiner: bool


@dataclass(frozen=True)
class NodeKind:
    """What the nodes of one kind have in common."""

    partitions: frozenset[str]
    offers: frozenset[tuple[str, int]]
    """As ``QueueEntry.demands``."""
    cpus: int

    def suits(self, job: QueueEntry) -> bool:
        if self.partitions.isdisjoint(job.partitions):
            return False
        return all(any(it == what and has >= least for it, has in self.offers) for what, least in job.demands)


@dataclass(frozen=True)
class NodeEntry:
    """A node of the cluster."""

    name: str
    is_free: bool
    kind: NodeKind


@dataclass(frozen=True)
class Holding:
    """What the job has and may have."""

    job: str
    """Its ``QueueEntry.id``."""
    names: tuple[str, ...]
    """Slurm's names of its connected nodes, in the order in which they are given up."""
    missing: int
    """Its own nodes that are not connected, and may come back."""
    least: int
    most: int
    sizes: tuple[int, ...]
    """The numbers of nodes that it may keep, ascending; empty for all from ``least`` to ``most``."""
    own: int = 0
    """How many of ``names`` belong to the job's own allocation; joiners are given up before them."""

    def at_most(self, nodes: int) -> int | None:
        """The largest number of nodes, up to ``nodes``, that the job may keep; None if there is none."""
        return max((size for size in self.sizes or (nodes,) if self.least <= size <= nodes), default=None)


@dataclass(frozen=True)
class Gift:
    """Nodes that the job gives up for another job."""

    job: str
    """``QueueEntry.array`` of the other job."""
    held: frozenset[str]
    """The nodes that this job had before."""
    running: frozenset[str]
    """The jobs that had nodes before."""
    since: float
    """When this job left the nodes, as far as is known."""


@dataclass(frozen=True)
class Yielding:
    """What has been decided so far."""

    cap: int | None = None
    """How many nodes the job may have, because others wait; None: as many as its MAX allows."""
    reason: str = "no job waits for its nodes"
    """Why there is a cap, or none."""
    gift: Gift | None = None
    """The last gift, until its outcome is known."""
    next_at: float = -float("inf")
    """When the next gift may be made."""
    in_vain: int = 0
    """How many of the last gifts let no job start."""
    useless: frozenset[str] = frozenset()
    """Jobs that did not start on the nodes that were given up for them."""


Event = tuple[str, dict[str, Any]]


def next_yielding(
    before: Yielding,
    rule: Rule,
    holding: Holding,
    jobs: Sequence[QueueEntry],
    nodes: Sequence[NodeEntry],
    now: float,
) -> tuple[Yielding, list[Event]]:
    """The new state, and the events to record. ``jobs``: all jobs that Slurm knows, including jobs that have just
    ended. ``nodes``: all nodes of the cluster.
    """
    kinds = {node.name: node.kind for node in nodes}
    free = defaultdict(set)
    for node in nodes:
        if node.is_free and node.name not in holding.names:
            free[node.kind].add(node.name)
    waiting = list(_waiting(before, rule, holding, jobs, kinds, free))
    state, event = _watched(before, rule, holding, jobs, dict(waiting), now)
    in_reach = [(job, lack) for job, lack in waiting if lack <= holding.most - holding.least]
    in_reach = [(job, lack) for job, lack in in_reach if job.array not in state.useless]
    events = [event] if event else []
    if not in_reach:
        still = state.useless & {job.array for job in jobs if job.waits}
        cap, reason = (state.cap, state.reason) if state.gift else (None, Yielding.reason)
        return replace(state, cap=cap, reason=reason, useless=still), events
    if state.gift is None and now >= state.next_at:
        for job, lack in in_reach:
            cap = _cap(job, lack, holding, kinds) if lack > 0 else None
            if cap is not None:
                return _give(state, rule, holding, jobs, job, cap, now, events)
    cap = state.cap or max(holding.least, len(holding.names) + holding.missing)
    return replace(state, cap=cap, reason=f"{_named(in_reach[0][0])} waits for nodes"), events


def _give(
    state: Yielding,
    rule: Rule,
    holding: Holding,
    jobs: Iterable[QueueEntry],
    job: QueueEntry,
    cap: int,
    now: float,
    events: list[Event],
) -> tuple[Yielding, list[Event]]:
    """Continue with ``cap`` nodes so that ``job`` can start."""
    given = len(holding.names) - cap
    reason = f"{_named(job)} waits for nodes"
    gift = Gift(job.array, frozenset(holding.names), frozenset(other.id for other in jobs if other.nodes), now)
    fields = {"job": job.id, "user": job.user, "given": given, "kept": cap, "reason": reason}
    state = replace(state, cap=cap, reason=reason, gift=gift, next_at=now + rule.every)
    return state, [*events, ("yield", fields)]


def _watched(
    state: Yielding,
    rule: Rule,
    holding: Holding,
    jobs: Sequence[QueueEntry],
    lacks: dict[QueueEntry, int],
    now: float,
) -> tuple[Yielding, Event | None]:
    """What happened to the last gift. ``lacks``: how many nodes each job that waits for nodes still lacks."""
    gift = state.gift
    if gift is None:
        return state, None
    new = [job for job in jobs if job.nodes and job.id not in gift.running]
    if started := [job for job in new if job.array == gift.job]:
        fields = {"job": started[0].id, "started": True, "reason": f"it runs on {started[0].nodes}"}
        return replace(state, gift=None, in_vain=0), ("yielded", fields)
    waits = next((job for job in jobs if job.array == gift.job and job.waits), None)
    if waits is None:
        fields = {"job": gift.job, "started": None, "reason": "it is no longer in the queue"}
        return replace(state, gift=None), ("yielded", fields)
    if state.cap is not None and state.cap < holding.least:  # it was resized
        fields = {"job": waits.id, "started": False, "reason": f"this job needs {holding.least} nodes by now"}
        return replace(state, cap=None, gift=None), ("yielded", fields)
    if state.cap is not None and len(holding.names) > state.cap:  # the workers save, or the nodes are being released
        return replace(state, gift=replace(gift, since=now)), None
    gone = gift.held - frozenset(holding.names)
    takers = [job for job in new if any(map(name_matcher(job.nodes), gone))]
    useless = state.useless
    if takers and lacks.get(waits, 1) > 0:
        reason = f"{_named(takers[0])} runs on {takers[0].nodes} instead"
    elif now - gift.since > PATIENCE:
        reason = f"it has not started on the nodes that are left to it: {waits.reason}"
        useless |= {gift.job}
    else:
        return state, None
    in_vain = min(state.in_vain + 1, _MOST_DOUBLINGS)
    state = replace(state, gift=None, in_vain=in_vain, next_at=now + rule.every * 2**in_vain, useless=useless)
    return state, ("yielded", {"job": waits.id, "started": False, "reason": reason})


def _waiting(
    state: Yielding,
    rule: Rule,
    holding: Holding,
    jobs: Iterable[QueueEntry],
    kinds: dict[str, NodeKind],
    free: dict[NodeKind, set[str]],
) -> Iterator[tuple[QueueEntry, int]]:
    """The jobs to which this job may give way, in Slurm's order, and how many nodes each lacks. No job gives way to a
    joiner: two growing jobs would take the same nodes from each other repeatedly.
    """
    own = next((job for job in jobs if job.id == holding.job), None)
    held = {kinds[name] for name in holding.names if name in kinds}
    waiting = (job for job in jobs if job.waits and _LACKING.fullmatch(job.reason) and not job.is_joiner)
    for job in sorted(waiting, key=lambda job: -job.priority):
        matches = {
            "pending": True,
            "qos": job.qos == rule.name,
            "partition": rule.name in job.partitions,
            "user": own is not None and job.user == own.user,
        }
        cpus = max((kind.cpus for kind in held if kind.suits(job)), default=0)
        if not matches[rule.to] or job.array in state.useless or not cpus:
            continue
        least = max(job.least, -(-job.cpus // cpus))
        suiting = (kind for kind in free if kind.suits(job))
        found = [(kind, name) for kind in suiting for name in free[kind] if _may_be(name, job)]
        if len(found) >= least:  # it is about to start
            for kind, name in found[:least]:
                free[kind].discard(name)
        yield job, least - len(found)


def _cap(job: QueueEntry, lack: int, holding: Holding, kinds: dict[str, NodeKind]) -> int | None:
    """How many nodes this job keeps if ``job`` gets the ``lack`` nodes that it lacks; None if too few would be left."""
    suiting = {kind for kind in {kinds.get(name) for name in holding.names} if kind and kind.suits(job)}
    for given, name in enumerate(holding.names, 1):
        lack -= kinds.get(name) in suiting and _may_be(name, job)
        if not lack:
            return holding.at_most(len(holding.names) - given)
    return None


def _may_be(node: str, job: QueueEntry) -> bool:
    """Whether ``job`` may be on ``node``, by its name."""
    return not job.required or name_matcher(job.required)(node)


def _named(job: QueueEntry) -> str:
    return f"job {job.id} of {job.user}"
