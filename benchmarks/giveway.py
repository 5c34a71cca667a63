"""A model: what a site gains when some of its jobs are elastic, give nodes to jobs that wait, and grow when none waits.

Nothing runs. Jobs of published sizes and run times come to a cluster of 128 nodes, which starts them in the order of
their submission, with EASY backfill. The elastic ones give way as those of elastic_hpc do: by its own decision.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from _report import parser_with, positive, show, table_of, write_json
from _site import NODES, RULE, SOURCE, Site, workload
from rich.table import Table

Row = dict[str, Any]


HOW = ("rigid", "keep", "give way")
"""The behaviour of the jobs that could be elastic: they are rigid too; they start with the free nodes, grow, and keep
all nodes; or they give way.
"""


def simulate(seed: int, count: int, load: float, share: float, scaling: float, how: str) -> dict[str, float]:
    """Results for the jobs between the first and the last tenth of the submissions."""
    jobs = workload(seed, count, load, share, scaling)
    chosen = {job.id for job in jobs if job.is_elastic}
    if how == "rigid":
        jobs = [job.rigid() for job in jobs]
    begin, end = jobs[count // 10].submitted, jobs[-count // 10].submitted
    site = Site(jobs, rule=RULE if how == "give way" else None)
    site.run(begin)
    used = site.used
    site.run(end)
    row = {"used": (site.used - used) / (NODES * (end - begin))}
    site.run()
    measured = [job for job in jobs if begin <= job.submitted < end]
    for name, found in (
        ("all", measured),
        ("others", [job for job in measured if job.id not in chosen]),
        ("elastic", [job for job in measured if job.id in chosen]),
    ):
        row[f"wait, {name}"] = statistics.mean((job.started - job.submitted) / 60 for job in found)
        row[f"turnaround, {name}"] = statistics.mean((job.ended - job.submitted) / 60 for job in found)
    row["gifts"] = sum(job.gifts for job in measured)
    row["elastic jobs"] = len(chosen.intersection(job.id for job in measured))
    return row


def compare(loads: Sequence[float], shares: Sequence[float], seeds: int, count: int, scaling: float) -> Iterator[Row]:
    """A row for each load, share and way, with means over ``seeds``."""
    for load, share, how in itertools.product(loads, shares, HOW):
        runs = [simulate(seed, count, load, share, scaling, how) for seed in range(1, seeds + 1)]
        yield {"load": load, "share": share, "how": how} | {
            name: statistics.mean(run[name] for run in runs) for name in runs[0]
        }


def table(rows: Sequence[Row]) -> Table:
    names = (
        "wait, all",
        "wait, others",
        "wait, elastic",
        "turnaround, all",
        "turnaround, others",
        "turnaround, elastic",
    )
    made = table_of("minutes, means", ("load", "elastic", "these", *names, "used", "gifts"), left=("these",))
    for row in rows:
        first = (f"{row['load']:.0%}", f"{row['share']:.0%}") if row["how"] == HOW[0] else ("", "")
        times = [f"{row[name]:.0f}" for name in names]
        made.add_row(*first, row["how"], *times, f"{row['used']:.1%}", f"{row['gifts']:.0f}")
    return made


def main() -> int:
    parser = parser_with(__doc__, {f"Sizes and run times: {SOURCE}, its parameters for all jobs.": ""})
    add = parser.add_argument
    text = "of the cluster, which the jobs ask for (default: 0.7 0.85)"
    add("--loads", type=float, nargs="+", default=[0.7, 0.85], metavar="SHARE", help=text)
    text = "of the jobs of two nodes and ten minutes or more, which are elastic (default: 0.2 0.5)"
    add("--shares", type=float, nargs="+", default=[0.2, 0.5], metavar="SHARE", help=text)
    text = "sites simulated of each, with the seeds 1 to N (default: 4)"
    add("--seeds", type=positive, default=4, metavar="N", help=text)
    add("--jobs", type=positive, default=1000, metavar="N", help="of each site (default: 1000)")
    text = "speed is the number of nodes to this power (default: 1)"
    add("--scaling", type=float, default=1.0, metavar="POWER", help=text)
    args = parser.parse_args()
    rows = list(compare(args.loads, args.shares, args.seeds, args.jobs, args.scaling))
    show(table(rows), width=160)
    write_json(args.json, {"inputs": {**vars(args), "json": None}, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
