"""A model: the share of a month in which a job of 16 to 2,048 nodes trains under node failures, for each launcher.

Nothing runs. Failures come at published rates; recovery.py has measured how long training stops at a failure under each
launcher; the rest are assumptions, the same for all launchers. All inputs are listed below.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _month import (
    DAY,
    GROUP_TIMEOUT,
    LEAST,
    SLURMD_TIMEOUT,
    TUNED_NODE,
    TUNED_TIMEOUT,
    Inputs,
    Recovery,
    launchers,
    simulate,
)
from _report import figure, parser_with, positive, show, table_of, write_json
from rich.table import Table

SIZES = (16, 128, 512, 2048)
RATES = {
    "RSC-2": (2.34, "Kokolis et al., Revisiting Reliability in Large-Scale ML Research Clusters, arXiv 2410.21680"),
    "Llama 3": (
        419 / 54 / 2048 * 1000,
        "419 interruptions in 54 days on 2,048 nodes of 8 GPUs, The Llama 3 Herd of Models, arXiv 2407.21783",
    ),
    "RSC-1": (6.50, "as RSC-2"),
}
"""Failures per thousand node-days, and the source."""


def compare(sizes: Sequence[int], seeds: int, recovery: Recovery, common: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each rate, size and launcher, with means over ``seeds`` months. ``common``: fields of Inputs."""
    rows = []
    for source, (rate, _) in RATES.items():
        for nodes in sizes:
            inputs = Inputs(nodes=nodes, rate=rate / 1000, **common)
            for by in launchers(recovery, nodes):
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
        ours = next(first for first in rows if (first["rate"], first["nodes"]) == (row["rate"], row["nodes"]))
        row["of_ours"] = row["trained"] / ours["trained"]
        row["lost_of_ours"] = (1 - row["trained"]) / (1 - ours["trained"])
    return rows


def report(sizes: Sequence[int], seeds: int, recovery: Recovery, **common: float) -> dict[str, Any]:
    """All rows with their inputs. ``common``: fields of Inputs."""
    rows = compare(sorted(sizes), seeds, recovery, common)
    days = Inputs(nodes=1, rate=0).horizon / DAY
    inputs = {"recovery": asdict(recovery), "common": common, "rates": RATES, "seeds": seeds}
    return {"inputs": inputs, "rows": rows, "table": lines(rows, days)}


def lines(rows: Sequence[dict[str, Any]], days: float) -> list[dict[str, Any]]:
    """For run.py's table: hours of a month without training, at the middle rate, for the largest and smallest job."""
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
    names = ("failures", "nodes", "launcher", "goodput", "trained", "of ours", "lost, of ours", "stops", "queued")
    made = table_of("means; trained: of the month, at full size", names, left=("failures", "launcher"))
    for row in rows:
        first = row["launcher"] == "elastic"
        cells = [row["rate"], f"{row['nodes']}"] if first else ["", ""]
        cells += [row["launcher"], f"{row['goodput']:.1%}", f"{row['trained']:.1%}"]
        cells += ["", ""] if first else [f"x {row['of_ours']:.3f}", f"x {row['lost_of_ours']:.1f}"]
        made.add_row(*cells, f"{row['interruptions']:.1f}", f"{row['queued']:.1f}")
    return made


def model() -> str:
    """The model and the sources of its inputs, for --help."""
    inputs = Inputs(nodes=1, rate=0)
    in_days = "failures in a thousand node-days"
    rates = [f"  {name:<9}{rate:.2f} {in_days}: {source}" for name, (rate, source) in RATES.items()]
    measured = ", ".join(f"{name} {seconds:g}" for name, seconds in asdict(Recovery()).items())
    return "\n".join(
        [
            "published:",
            *rates,
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
            "  elastic      continues with fewer nodes; takes new ones in at its next start, or after a checkpoint",
            "  requeue only each failure is a pass through the queue, with 121 s of Slurm's own",
            "  torchrun     a killed worker is started again (own store); a lost node is a pass through the queue",
            "  torchrun, spares   continues with fewer nodes after the timeout; loses the job with its first node;",
            "               gets no new nodes but in the queue",
            "goodput: share of the node-hours held, spares included, that went into steps that lasted",
        ]
    )


def recovery_times(path: str) -> Recovery:
    try:
        return Recovery.of(json.loads(Path(path).read_text())["summary"])
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{path!r}: expected the JSON of recovery.py: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(__doc__, {})
    parser.epilog = model()
    add = parser.add_argument
    add("--sizes", type=positive, nargs="+", default=list(SIZES), metavar="NODES", help="default: 16 128 512 2048")
    add("--seeds", type=positive, default=20, metavar="N", help="months simulated of each (default: 20)")
    add("--save", type=positive, default=30, metavar="SECONDS", help="of one checkpoint (default: 30)")
    add("--load", type=positive, default=60, metavar="SECONDS", help="of each start of the workers (default: 60)")
    text = "mean until Slurm has another node (default: 30)"
    add("--replacement", type=positive, default=30, metavar="MINUTES", help=text)
    text = "recovery times from the JSON of recovery.py"
    add("--recovery", type=recovery_times, default=Recovery(), metavar="FILE", help=text)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    common = {"save": args.save, "load": args.load, "replacement": args.replacement * 60.0}
    made = report(args.sizes, args.seeds, args.recovery, **common)
    show(table(made["rows"]))
    write_json(args.json, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
