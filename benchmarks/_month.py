"""The model behind goodput.py: a month of a job, event by event, and how each launcher recovers from a failure."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

DAY = 86400.0


@dataclass(frozen=True)
class Recovery:
    """Seconds from a fault to the first step of the new world, measured on four nodes with a small model."""

    worker: float = 5.3
    node: float = 8.2
    head: float = 9.3
    requeue: float = 22.4
    """From the last step before the requeue, with an empty queue."""
    grow: float = 4.0
    """How long training stops while a node joins."""
    torchrun_worker: float = 10.0
    """With a store for each attempt; with its defaults torchrun does not always recover."""
    torchrun_node: float = 46.0
    """Measured with a killed agent. Counted from the moment at which the workers of the other nodes give up."""
    torchrun_requeue: float = 132.3
    """``scontrol requeue``, of which 121 s are Slurm's own delay."""

    @classmethod
    def of(cls, summary: Sequence[dict[str, Any]]) -> Recovery:
        """From the summary of recovery.py; a time that was not measured there keeps its default."""
        ours, own_store = "elastic", "torchrun-own-store"
        names = {
            ("worker", ours): "worker",
            ("power", ours): "node",
            ("head", ours): "head",
            ("requeue", ours): "requeue",
            ("worker", own_store): "torchrun_worker",
            ("agent", own_store): "torchrun_node",
            ("requeue", "torchrun"): "torchrun_requeue",
        }
        totals = {names.get((row["rung"], row["launcher"])): row["total"] for row in summary}
        return cls(**{name: total["median"] for name, total in totals.items() if name and total})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all launchers have in common. Times in seconds."""

    nodes: int
    rate: float
    """Failures per node and day."""
    process: float = 63 / 419
    """Share of failures after which the node can be used again."""
    save: float = 30.0
    """How long a checkpoint stops the training."""
    load: float = 60.0
    """Added to the measured times at each start of the workers: framework, checkpoint, first step of a large model."""
    replacement: float = 1800.0
    """Mean time until Slurm replaces a lost node; exponentially distributed."""
    horizon: float = 30 * DAY
    interval: float | None = None
    """From one checkpoint to the next; None for the optimal interval."""

    @property
    def every(self) -> float:
        """Young's and Daly's interval, sqrt(2 save MTBF); the whole month if there are no failures."""
        if self.interval is not None:
            return self.interval
        if not self.rate:
            return self.horizon
        return min(self.horizon, math.sqrt(2 * self.save * DAY / (self.nodes * self.rate)))


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How a launcher recovers from a failure. Times are seconds to the first step, without ``Inputs.load``."""

    name: str
    worker: float | None
    """Recovery in the allocation after a worker's death; None: by a requeue."""
    node: float
    """Recovery in the allocation after the loss of a node, detection included."""
    head: float | None
    """The same for the first node; None: by a requeue."""
    hang: float = 0.0
    """Until the launcher notices a loss that leads to a requeue; the job holds its nodes meanwhile."""
    requeue: float
    least: float = 1.0
    """MIN as a share of the nodes; with fewer nodes the job is requeued."""
    spares: int = 0
    grow: float | None = None
    """How long training stops while replacement nodes join; None: only a requeue brings replacement nodes."""
    grow_every: float = 60.0


SLURMD_TIMEOUT = 300.0
"""Slurm's default: after that time Slurm sets a silent node DOWN and ends its job."""
GROUP_TIMEOUT = 600.0
"""torch's default for NCCL: after that time the workers of a world that has lost a peer give up."""
TUNED_TIMEOUT, TUNED_NODE = 60.0, 7.0
"""The same, and the time to a new world, with the shortest possible settings: 6.4 to 8.8 s were measured."""
LEAST = 0.9


def launchers(recovery: Recovery, nodes: int) -> list[Launcher]:
    """All launchers of the comparison, ours first."""
    spares = max(1, nodes // 256)
    ours = Launcher(
        name="elastic",
        worker=recovery.worker,
        node=recovery.node,
        head=recovery.head,
        requeue=recovery.requeue,
        least=LEAST,
        grow=recovery.grow,
    )
    rigid = Launcher(
        name="requeue only",
        worker=None,
        node=0.0,
        head=None,
        hang=SLURMD_TIMEOUT,
        requeue=recovery.torchrun_requeue,
    )
    spared = replace(
        rigid,
        name="torchrun, spares",
        worker=recovery.torchrun_worker,
        node=GROUP_TIMEOUT + recovery.torchrun_node,
        least=LEAST,
        spares=spares,
    )
    return [
        ours,
        replace(ours, name="elastic, spares", spares=spares),
        rigid,
        replace(rigid, name="torchrun", worker=recovery.torchrun_worker),
        spared,
        replace(spared, name="torchrun, spares, tuned", node=TUNED_TIMEOUT + TUNED_NODE),
    ]


@dataclass
class Month:
    """The result of a month. ``trained``: seconds of the full world whose steps were kept."""

    trained: float = 0.0
    node_seconds: float = 0.0
    interruptions: int = 0
    queued: int = 0


class _Job:
    """One job, from event to event. Failures have no memory, so the next failure may be redrawn at each event."""

    def __init__(self, inputs: Inputs, by: Launcher, seed: int) -> None:
        self._inputs, self._by = inputs, by
        self._random = random.Random(seed)  # noqa: S311 - a model
        self._arrivals: list[float] = []
        """When Slurm will have replaced each lost node."""
        self._least = math.ceil(by.least * inputs.nodes)
        self._now = 0.0
        self._active, self._spares, self._idle = inputs.nodes, by.spares, 0
        self._started = 0.0  # when the workers started the round
        self._unsaved = 0.0
        self._until_save = inputs.every
        self._down = self._saving = 0.0  # remaining seconds of a standstill, of a checkpoint
        self.month = Month()

    def run(self) -> Month:
        horizon = self._inputs.horizon
        while self._now < horizon:
            self._refill()
            ends = self._down or self._saving or self._until_save
            if self._can_grow_later():
                ends = min(ends, self._started + self._by.grow_every - self._now)
            held = self._active + self._spares
            rate = held * self._inputs.rate / DAY
            fails = self._random.expovariate(rate) if rate else math.inf
            comes = self._arrivals[0] - self._now if self._arrivals else math.inf
            step = min(ends, fails, comes, horizon - self._now)
            self._pass(step, held)
            if step == fails:
                self._fail(held)
        self.month.trained += self._unsaved  # nothing has taken that away
        return self.month

    def _pass(self, seconds: float, held: int) -> None:
        self._now += seconds
        self.month.node_seconds += seconds * held
        if self._down:
            self._down = max(0.0, self._down - seconds)
            if self._down < 1e-6:
                self._down, self._started = 0.0, self._now
        elif self._saving:
            self._saving = max(0.0, self._saving - seconds)
            if self._saving < 1e-6:
                self._saved()
        else:
            self._unsaved += seconds * self._active / self._inputs.nodes
            self._until_save -= seconds
            if self._until_save < 1e-6 or self._wants_to_grow():
                self._saving = self._inputs.save
                if not self._saving:
                    self._saved()

    def _saved(self) -> None:
        self._saving = 0.0
        self.month.trained += self._unsaved
        self._unsaved, self._until_save = 0.0, self._inputs.every
        if self._by.grow is not None and self._wants_to_grow():
            self._start(self._by.grow)

    def _wants_to_grow(self) -> bool:
        return self._can_grow() and self._now - self._started > self._by.grow_every - 1e-6

    def _can_grow_later(self) -> bool:
        return self._can_grow() and not (self._down or self._saving) and not self._wants_to_grow()

    def _can_grow(self) -> bool:
        return self._by.grow is not None and self._idle > 0 and self._active < self._inputs.nodes

    def _refill(self) -> None:
        """Take the nodes that Slurm has replaced by now. Nodes that become spares cost no time."""
        while self._arrivals and self._arrivals[0] <= self._now:
            heapq.heappop(self._arrivals)
            self._idle += 1
        if self._by.grow is not None and self._active == self._inputs.nodes:
            more = min(self._idle, self._by.spares - self._spares)
            self._spares += more
            self._idle -= more

    def _start(self, seconds: float) -> None:
        """Begin a new round with all available nodes."""
        for name in ("_spares", "_idle") if self._by.grow is not None else ("_spares",):
            more = min(getattr(self, name), self._inputs.nodes - self._active)
            self._active += more
            setattr(self, name, getattr(self, name) - more)
        self._down = max(1e-3, seconds + self._inputs.load)

    def _fail(self, held: int) -> None:
        hit = self._random.random() * held
        self._saving, self._until_save = 0.0, self._inputs.every
        process = self._random.random() < self._inputs.process
        if hit >= self._active:  # a spare: no worker waits for it
            if not process:
                self._spares -= 1
                self._lose()
            return
        self.month.interruptions += 1
        self._unsaved = 0.0
        if process:
            seconds = self._by.worker
        else:
            self._active -= 1
            self._lose()
            seconds = self._by.head if hit < 1 else self._by.node
        if seconds is None or self._active + self._spares + self._ready() < self._least:
            self._requeue(0.0 if process else self._by.hang)
        else:
            self._start(seconds)

    def _ready(self) -> int:
        return self._idle if self._by.grow is not None else 0

    def _lose(self) -> None:
        heapq.heappush(self._arrivals, self._now + self._random.expovariate(1 / self._inputs.replacement))

    def _requeue(self, hang: float) -> None:
        """Requeue the job, which holds no nodes until Slurm has enough for it."""
        self.month.queued += 1
        self.month.node_seconds += hang * (self._active + self._spares)
        self._now += hang
        have = self._active + self._spares + self._idle
        while self._arrivals and (self._arrivals[0] <= self._now or have < self._least):
            self._now = max(self._now, heapq.heappop(self._arrivals))
            have += 1
        self._now += self._by.requeue
        self._active = min(have, self._inputs.nodes)
        self._spares = min(have - self._active, self._by.spares)
        self._idle = have - self._active - self._spares
        self._down = max(1e-3, self._inputs.load)


def simulate(inputs: Inputs, by: Launcher, seed: int) -> Month:
    return _Job(inputs, by, seed).run()
