"""A model: how much of a month a job of 16 to 2,048 nodes trains under node failures, by what launches it.

Nothing runs. Failures come at published rates; how long each launcher stands still for one is what recovery.py has
measured; the rest are assumptions, the same for all launchers. All inputs are listed below.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _cluster import can_write, figure, positive
from rich.console import Console
from rich.table import Table

DAY = 86400.0
SIZES = (16, 128, 512, 2048)
RATES = {
    "RSC-2": (2.34, "Kokolis et al., Revisiting Reliability in Large-Scale ML Research Clusters, arXiv 2410.21680"),
    "Llama 3": (
        419 / 54 / 2048 * 1000,
        "419 interruptions in 54 days on 2,048 nodes of 8 GPUs, The Llama 3 Herd of Models, arXiv 2407.21783",
    ),
    "RSC-1": (6.50, "as RSC-2"),
}
"""Failures in a thousand node-days, and who says so."""


@dataclass(frozen=True)
class Recovery:
    """Seconds from a fault to the first step of the new world, measured on four nodes with a small model."""

    worker: float = 5.3
    node: float = 8.2
    head: float = 9.3
    requeue: float = 22.4
    """From the last step, through an empty queue."""
    grow: float = 4.0
    """How long a job stands still to take a node in."""
    torchrun_worker: float = 10.0
    """With a store for each attempt; with its defaults it does not come back each time."""
    torchrun_node: float = 46.0
    """An agent is killed. Used from the moment at which the workers of the others give up."""
    torchrun_requeue: float = 132.3
    """``scontrol requeue``, of which 121 s are Slurm's own delay."""

    @classmethod
    def of(cls, summary: Sequence[dict[str, Any]]) -> Recovery:
        """From the summary of recovery.py; what was not measured there keeps its default."""
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
    """Failures of a node in a day."""
    process: float = 63 / 419
    """Share of failures that leave the node fit."""
    save: float = 30.0
    """Training stands still for a checkpoint."""
    load: float = 60.0
    """Framework, checkpoint, first step of a large model, at each start of the workers, beside what was measured."""
    replacement: float = 1800.0
    """Mean time until Slurm has another node in place of one that is lost; exponential."""
    horizon: float = 30 * DAY
    interval: float | None = None
    """From one checkpoint to the next; None for the optimum."""

    @property
    def every(self) -> float:
        """Young's and Daly's interval, sqrt(2 save MTBF), without failures the whole month."""
        if self.interval is not None:
            return self.interval
        if not self.rate:
            return self.horizon
        return min(self.horizon, math.sqrt(2 * self.save * DAY / (self.nodes * self.rate)))


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What a launcher does about a failure. Seconds to the first step, without ``Inputs.load``."""

    name: str
    worker: float | None
    """In the allocation, after a worker's death; None: through the queue."""
    node: float
    """In the allocation, after a node's loss: until it is noticed, and the new world."""
    head: float | None
    """The same for the first node; None: through the queue."""
    hang: float = 0.0
    """Until a loss is noticed that ends in the queue; the nodes are held meanwhile."""
    requeue: float
    least: float = 1.0
    """MIN as a share of the nodes; with fewer the job goes through the queue."""
    spares: int = 0
    grow: float | None = None
    """To take in nodes that Slurm has found; None: only a job that comes out of the queue gets any."""
    grow_every: float = 60.0


SLURMD_TIMEOUT = 300.0
"""Slurm's default: after that it takes a silent node for lost, and ends its job."""
GROUP_TIMEOUT = 600.0
"""torch's default for NCCL: after that the workers of a world that has lost a peer give up."""
TUNED_TIMEOUT, TUNED_NODE = 60.0, 7.0
"""The same, and a new world, with settings as short as they can be: 6.4 to 8.8 s were measured."""
LEAST = 0.9


def launchers(found: Recovery, nodes: int) -> list[Launcher]:
    """All that are compared, ours first."""
    spares = max(1, nodes // 256)
    ours = Launcher(
        name="elastic",
        worker=found.worker,
        node=found.node,
        head=found.head,
        requeue=found.requeue,
        least=LEAST,
        grow=found.grow,
    )
    rigid = Launcher(
        name="requeue only",
        worker=None,
        node=0.0,
        head=None,
        hang=SLURMD_TIMEOUT,
        requeue=found.torchrun_requeue,
    )
    spared = replace(
        rigid,
        name="torchrun, spares",
        worker=found.torchrun_worker,
        node=GROUP_TIMEOUT + found.torchrun_node,
        least=LEAST,
        spares=spares,
    )
    return [
        ours,
        replace(ours, name="elastic, spares", spares=spares),
        rigid,
        replace(rigid, name="torchrun", worker=found.torchrun_worker),
        spared,
        replace(spared, name="torchrun, spares, tuned", node=TUNED_TIMEOUT + TUNED_NODE),
    ]


@dataclass
class Month:
    """What came of it. ``trained``: steps that lasted, in seconds of the full world."""

    trained: float = 0.0
    node_seconds: float = 0.0
    interruptions: int = 0
    queued: int = 0


class _Job:
    """One job, from event to event. Failures have no memory, so the next one may be drawn anew at each event."""

    def __init__(self, inputs: Inputs, by: Launcher, seed: int) -> None:
        self._inputs, self._by = inputs, by
        self._random = random.Random(seed)  # noqa: S311 - a model
        self._coming: list[float] = []
        """When Slurm will have nodes for those that were lost."""
        self._least = math.ceil(by.least * inputs.nodes)
        self._now = 0.0
        self._active, self._spares, self._found = inputs.nodes, by.spares, 0
        self._since = 0.0  # when the workers have started
        self._unsaved = 0.0
        self._until_save = inputs.every
        self._down = self._saving = 0.0  # what is left of either
        self.month = Month()

    def run(self) -> Month:
        horizon = self._inputs.horizon
        while self._now < horizon:
            self._refill()
            ends = self._down or self._saving or self._until_save
            if self._can_grow_later():
                ends = min(ends, self._since + self._by.grow_every - self._now)
            held = self._active + self._spares
            rate = held * self._inputs.rate / DAY
            fails = self._random.expovariate(rate) if rate else math.inf
            comes = self._coming[0] - self._now if self._coming else math.inf
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
                self._down, self._since = 0.0, self._now
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
        return self._can_grow() and self._now - self._since > self._by.grow_every - 1e-6

    def _can_grow_later(self) -> bool:
        return self._can_grow() and not (self._down or self._saving) and not self._wants_to_grow()

    def _can_grow(self) -> bool:
        return self._by.grow is not None and self._found > 0 and self._active < self._inputs.nodes

    def _refill(self) -> None:
        """Nodes that have come; to be spares, where there may be any, costs nothing."""
        while self._coming and self._coming[0] <= self._now:
            heapq.heappop(self._coming)
            self._found += 1
        if self._by.grow is not None and self._active == self._inputs.nodes:
            more = min(self._found, self._by.spares - self._spares)
            self._spares += more
            self._found -= more

    def _start(self, seconds: float) -> None:
        """A new round: it takes in all that are there."""
        for name in ("_spares", "_found") if self._by.grow is not None else ("_spares",):
            more = min(getattr(self, name), self._inputs.nodes - self._active)
            self._active += more
            setattr(self, name, getattr(self, name) - more)
        self._down = max(1e-3, seconds + self._inputs.load)

    def _fail(self, held: int) -> None:
        hit = self._random.random() * held
        self._saving, self._until_save = 0.0, self._inputs.every
        process = self._random.random() < self._inputs.process
        if hit >= self._active:  # a spare: nobody waits for it
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
        return self._found if self._by.grow is not None else 0

    def _lose(self) -> None:
        heapq.heappush(self._coming, self._now + self._random.expovariate(1 / self._inputs.replacement))

    def _requeue(self, hang: float) -> None:
        """Back through the queue, where the job holds nothing, until there are enough nodes."""
        self.month.queued += 1
        self.month.node_seconds += hang * (self._active + self._spares)
        self._now += hang
        have = self._active + self._spares + self._found
        while self._coming and (self._coming[0] <= self._now or have < self._least):
            self._now = max(self._now, heapq.heappop(self._coming))
            have += 1
        self._now += self._by.requeue
        self._active = min(have, self._inputs.nodes)
        self._spares = min(have - self._active, self._by.spares)
        self._found = have - self._active - self._spares
        self._down = max(1e-3, self._inputs.load)


def simulate(inputs: Inputs, by: Launcher, seed: int) -> Month:
    return _Job(inputs, by, seed).run()


def compare(sizes: Sequence[int], seeds: int, found: Recovery, common: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each rate, size and launcher, means over ``seeds`` months. ``common``: of Inputs."""
    rows = []
    for source, (rate, _) in RATES.items():
        for nodes in sizes:
            inputs = Inputs(nodes=nodes, rate=rate / 1000, **common)
            for by in launchers(found, nodes):
                months = [simulate(inputs, by, seed) for seed in range(seeds)]
                hours = [month.trained / inputs.horizon for month in months]
                row: dict[str, Any] = {
                    "rate": source,
                    "nodes": nodes,
                    "launcher": by.name,
                    "goodput": statistics.mean(month.trained * nodes / month.node_seconds for month in months),
                    "trained": statistics.mean(hours),
                    "trained_error": statistics.stdev(hours) / math.sqrt(seeds) if seeds > 1 else None,
                    "interruptions": statistics.mean(month.interruptions for month in months),
                    "queued": statistics.mean(month.queued for month in months),
                    "checkpoint_every": inputs.every,
                }
                rows.append(row)
    for row in rows:
        ours = next(one for one in rows if (one["rate"], one["nodes"]) == (row["rate"], row["nodes"]))
        row["of_ours"] = row["trained"] / ours["trained"]
        row["lost_of_ours"] = (1 - row["trained"]) / (1 - ours["trained"])
    return rows


def report(sizes: Sequence[int], seeds: int, found: Recovery, **common: float) -> dict[str, Any]:
    """All rows with what went into them. ``common``: of Inputs."""
    rows = compare(sorted(sizes), seeds, found, common)
    days = Inputs(nodes=1, rate=0).horizon / DAY
    inputs = {"recovery": asdict(found), "common": common, "rates": RATES, "seeds": seeds}
    return {"inputs": inputs, "rows": rows, "table": lines(rows, days)}


def lines(rows: Sequence[dict[str, Any]], days: float) -> list[dict[str, Any]]:
    """For run.py's table: hours of a month that do not train, at the middle rate, the largest and the smallest job."""
    sizes = sorted({row["nodes"] for row in rows})
    shown = []
    for nodes in dict.fromkeys((sizes[0], sizes[-1])):
        ours, *others = (row for row in rows if (row["rate"], row["nodes"]) == ("Llama 3", nodes))
        for other in others:
            mine, theirs = ((1 - row["trained"]) * days * 24 for row in (ours, other))
            what = f"model: hours lost in {days:g} days, {nodes} nodes"
            note = f"trains {ours['trained']:.1%}, theirs {other['trained']:.1%} of the month"
            shown.append(figure(what, mine, other["launcher"], theirs, unit="h", note=note))
    return shown


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="means; trained: of the month, at full size", title_justify="left")
    for name in ("failures", "nodes", "launcher", "goodput", "trained", "of ours", "lost, of ours", "stops", "queued"):
        made.add_column(name, justify="left" if name in {"failures", "launcher"} else "right")
    for row in rows:
        first = row["launcher"] == "elastic"
        cells = [row["rate"], f"{row['nodes']}"] if first else ["", ""]
        cells += [row["launcher"], f"{row['goodput']:.1%}", f"{row['trained']:.1%}"]
        cells += ["", ""] if first else [f"x {row['of_ours']:.3f}", f"x {row['lost_of_ours']:.1f}"]
        made.add_row(*cells, f"{row['interruptions']:.1f}", f"{row['queued']:.1f}")
    return made


def model() -> str:
    """The model and where its inputs come from, for --help."""
    found, inputs = Recovery(), Inputs(nodes=1, rate=0)
    told = [f"  {name:<9}{rate:.2f} failures in a thousand node-days: {said}" for name, (rate, said) in RATES.items()]
    measured = ", ".join(f"{name} {seconds:g}" for name, seconds in asdict(found).items())
    return "\n".join(
        [
            "published:",
            *told,
            f"  {inputs.process:.0%} of failures end a process and leave the node fit: software bugs, watchdogs and",
            "  dependencies, 54 + 7 + 2 of the 419 of Llama 3; which these are is our reading of its table",
            "measured, seconds (recovery.py, grow.py; without --recovery those of 2026-11-23, without standbys):",
            f"  {measured}",
            f"defaults of others: Slurm takes a silent node for lost after {SLURMD_TIMEOUT:g} s, torch's process group",
            f"  (NCCL) gives up after {GROUP_TIMEOUT:g} s; tuned, our choice: {TUNED_TIMEOUT:g} s,",
            f"  then {TUNED_NODE:g} s for a new world",
            "assumed, for all alike: a checkpoint stops training, at Young's and Daly's interval",
            "  sqrt(2 save MTBF); the workers' start takes --load more; speed is linear in nodes; Slurm finds",
            "  another node in place of a lost one after --replacement, exponential, and a job that is whole",
            "  starts at once; failures are independent and hit spares too.",
            f"  MIN is {LEAST:.0%} of the nodes for ours and torchrun with spares, else all.",
            "  Spares: one for each 256 nodes, at least one.",
            "launchers:",
            "  elastic      goes on with fewer nodes; takes new ones in at its next start, or after a checkpoint",
            "  requeue only each failure is a pass through the queue, with 121 s of Slurm's own",
            "  torchrun     a killed worker is started again (own store); a lost node is a pass through the queue",
            "  torchrun, spares   goes on with fewer nodes after the timeout; loses the job with its first node;",
            "               gets no new nodes but in the queue",
            "goodput: share of the node-hours held, spares included, that went into steps that lasted",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=model()
    )
    add = parser.add_argument
    add("--sizes", type=positive, nargs="+", default=list(SIZES), metavar="NODES", help="default: 16 128 512 2048")
    add("--seeds", type=positive, default=20, metavar="N", help="months simulated of each (default: 20)")
    add("--save", type=positive, default=30, metavar="SECONDS", help="of one checkpoint (default: 30)")
    add("--load", type=positive, default=60, metavar="SECONDS", help="of each start of the workers (default: 60)")
    text = "mean until Slurm has another node (default: 30)"
    add("--replacement", type=positive, default=30, metavar="MINUTES", help=text)
    add("--recovery", type=Path, metavar="FILE", help="recovery times from the JSON of recovery.py")
    add("--json", type=Path, metavar="FILE", help="write inputs and all rows")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if not can_write(args.json):
        return 2
    try:
        found = Recovery.of(json.loads(args.recovery.read_text())["summary"]) if args.recovery else Recovery()
    except (OSError, ValueError, KeyError) as error:
        wrong = f"--recovery {str(args.recovery)!r}: expected the JSON of recovery.py: {error}"
        print(f"goodput.py: {wrong}", file=sys.stderr)
        return 2
    common = {"save": args.save, "load": args.load, "replacement": args.replacement * 60.0}
    made = report(args.sizes, args.seeds, found, **common)
    Console(width=None if sys.stdout.isatty() else 120).print(table(made["rows"]))
    if args.json:
        args.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
