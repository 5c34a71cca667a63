"""Random faults, one after another and sometimes two at once, in one job on a real Slurm. It must survive them all.

The job is examples/train_digits.py on 2 to 4 nodes of bin/mini-slurm. The next fault comes when it trains again; at the
end it must have completed, with every step where it belongs and no process left behind.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _cluster import Cluster, cluster
from _faults import KINDS, Fault, draws
from _report import (
    BenchmarkError,
    machine,
    parser_with,
    positive,
    run_main,
    show,
    table_of,
    write_json,
)
from _soak import Soak
from rich.table import Table


@dataclass
class Report:
    """The results of the job and the faults."""

    seed: int
    planned: int
    """Number of faults that should have been injected."""
    job: str = ""
    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    evidence: str = ""
    seconds: float = 0.0
    requeues: int = 0
    rounds: int = 0
    steps: int = 0
    steps_lost: int = 0
    """Number of repeated steps in total."""

    def rows(self) -> list[dict[str, Any]]:
        """By kind, for faults that came alone: their number, how many ended no round, seconds to the next step."""
        sizes = Counter(fault.group for fault in self.faults)
        alone = [fault for fault in self.faults if sizes[fault.group] == 1]
        groups = {kind: [fault for fault in alone if fault.kind == kind] for kind in KINDS}
        groups["two at once"] = [fault for fault in self.faults if sizes[fault.group] > 1]
        rows = []
        for kind, faults in groups.items():
            times = [fault.next_step for fault in faults if fault.next_step is not None]
            if faults:
                row = {"kind": kind, "faults": len(faults), "no_restart": len(faults) - len(times)}
                rows.append(row | {"median": statistics.median(times or [0]), "max": max(times, default=0)})
        return rows

    def table(self) -> Table:
        names = ("fault", "survived", "trained on", "median", "max")
        made = table_of("seconds from the fault to the next round's first step", names, left=("fault",))
        for row in self.rows():
            times = [f"{row[name]:.1f}" if row["faults"] > row["no_restart"] else "" for name in ("median", "max")]
            made.add_row(row["kind"], str(row["faults"]), str(row["no_restart"] or ""), *times)
        return made


def soak(
    at: Cluster,
    seed: int,
    faults: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    deadline: float = 240,
    keep: Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Inject ``faults`` faults into one job. The report's ``problems`` lists what went wrong."""
    at.reset()
    folder = at.home / f"soak-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    report = Report(seed, faults)
    run = Soak(at, folder, deadline)
    report.job, report.faults = run.id, run.faults
    try:
        run.wait_until_it_trains()
        for group, drawn in enumerate(draws(seed, faults, kinds)):
            for made in run.inject(group, drawn):
                lasted = f" for {made.seconds:.1f} s" if made.seconds else ""
                then = f"trains after {made.next_step:.1f} s" if made.next_step else "trains on"
                number = run.faults.index(made) + 1
                say(
                    f"{number}/{faults} +{time.monotonic() - began:.0f} s: {made.kind} {','.join(made.nodes)}{lasted} "
                    f"({made.moment}): {then}, world of {run.steps()[-1]['world_size']}"
                )
        report.problems = run.finish()
        if report.problems:
            report.evidence = run.evidence()
    except (BenchmarkError, OSError) as error:
        report.problems.append(str(error))
        report.evidence = run.evidence()
    finally:
        run.undo_all()
        steps, events = run.steps(), run.events()
        report.seconds = time.monotonic() - began
        report.steps = max((step["step"] for step in steps), default=0)
        report.steps_lost = len(steps) - report.steps
        report.rounds = sum(event["event"] == "round" for event in events)
        report.requeues = max(0, sum(event["event"] == "start" for event in events) - 1)
        run.clear(keep)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"faults:": "", **KINDS},
        "sudo benchmarks/soak.py --seed 7",
        "sudo benchmarks/soak.py --faults 10 --kinds head-power head-cut --keep evidence",
        state=True,
        keep=True,
    )
    add = parser.add_argument
    add("--faults", type=positive, default=30, metavar="N", help="how many (default: 30)")
    add("--seed", type=positive, default=1, metavar="S", help="of the chance that chooses them (default: 1)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    text = "after a fault, for the job to train again (default: 240)"
    add("--deadline", type=positive, default=240, metavar="SECONDS", help=text)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    with cluster(args.state) as at:
        say = functools.partial(print, flush=True)
        report = soak(at, args.seed, args.faults, kinds=args.kinds, deadline=args.deadline, keep=args.keep, say=say)
    write_json(args.json, {"machine": machine(), "summary": report.rows(), **asdict(report)})
    show(report.table())
    print(
        f"seed {report.seed}: {len(report.faults)} of {report.planned} faults in {report.seconds:.0f} s; "
        f"{report.rounds} rounds, {report.requeues} requeues, {report.steps} steps, {report.steps_lost} repeated"
    )
    if report.problems:
        print(report.evidence)
        print("\n".join(f"soak.py: {problem}" for problem in report.problems), file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
