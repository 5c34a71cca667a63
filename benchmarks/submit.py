"""What elastic-sbatch adds to sbatch: wall and CPU seconds of the whole process, in alternating pairs.

sbatch is given the script that elastic-sbatch makes for the same job, so both submit the same thing. Jobs are held and
cancelled afterwards. Runs as the unprivileged user of mini-slurm, or with --here on any machine that has sbatch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _cluster import ROOT, BenchmarkError, add_state, busy, can_write, cluster, machine, positive
from rich.console import Console
from rich.table import Table

JOB = ["--hold", "--nodes=2:4", str(ROOT / "examples" / "train_digits.py"), "--epochs", "3"]
NEVER = ("torch", "submitit")
"""Modules that a submission must not import."""


@dataclass(frozen=True)
class Cost:
    """One process with all that it started and waited for, in seconds."""

    wall: float
    cpu: float


def run(argv: Sequence[str]) -> tuple[Cost, str]:
    """Run to the end: what it took, and what it printed. BenchmarkError if it failed."""
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(argv, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode:
        raise BenchmarkError(f"{' '.join(argv)}: exit code {process.returncode}: {text.strip()}")
    return Cost(wall, used.ru_utime + used.ru_stime), text


def measure(pairs: int) -> dict[str, Any]:
    """Submit ``pairs`` times each way, and take the jobs back."""
    ours = [str(Path(sys.executable).with_name("elastic-sbatch")), "--parsable"]
    jobs: list[str] = []
    found: dict[str, list[Cost]] = {"sbatch": [], "elastic-sbatch": [], "python -c pass": []}
    others = busy()
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        os.chdir(folder)
        script = Path(folder, "job.sbatch")
        script.write_text(run([*ours, "--dry-run", *JOB])[1])
        commands = {
            "sbatch": ["sbatch", "--parsable", str(script)],
            "elastic-sbatch": [*ours, *JOB],
            "python -c pass": [sys.executable, "-c", "pass"],
        }
        try:
            for number in range(-1, pairs):  # the first, which fills the file cache, does not count
                for name in commands if number % 2 else reversed(commands):
                    cost, said = run(commands[name])
                    if name != "python -c pass":
                        jobs.append(said.split()[0])
                    if number >= 0:
                        found[name].append(cost)
            modules = imported(
                [sys.executable, "-X", "importtime", "-m", "elastic_hpc.cli.sbatch", *ours[1:], *JOB], jobs
            )
        finally:
            if jobs:
                run(["scancel", *jobs])
            os.chdir("/")
    return {
        "busy_before": others,
        "costs": {name: [asdict(cost) for cost in costs] for name, costs in found.items()},
        "modules": modules,
    }


def imported(argv: Sequence[str], jobs: list[str]) -> dict[str, float]:
    """Packages outside the standard library that a submission imports, with the milliseconds that each took itself."""
    _, said = run(argv)
    jobs += re.findall(r"^(\d+)$", said, re.MULTILINE)
    took: dict[str, float] = {}
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", said, re.MULTILINE):
        package = module.partition(".")[0]
        if package not in sys.stdlib_module_names:
            took[package] = took.get(package, 0.0) + int(own) / 1000
    return dict(sorted(took.items(), key=lambda item: -item[1]))


def summarize(costs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each command; ratio and difference as medians over the pairs, so that a drift of the load cancels."""
    medians = {
        name: {kind: statistics.median(cost[kind] for cost in many) for kind in ("wall", "cpu")}
        for name, many in costs.items()
    }
    pairs = list(zip(costs["sbatch"], costs["elastic-sbatch"], strict=True))
    compared = {}
    for kind in ("wall", "cpu"):
        added = [ours[kind] - theirs[kind] for theirs, ours in pairs]
        compared[kind] = {
            "ratio": statistics.median(ours[kind] / theirs[kind] for theirs, ours in pairs),
            "added": {"median": statistics.median(added), "min": min(added), "max": max(added)},
        }
    return {"pairs": len(pairs), "medians": medians, "compared": compared}


def table(summary: dict[str, Any]) -> Table:
    made = Table(title=f"milliseconds, medians of {summary['pairs']} alternating pairs", title_justify="left")
    for name in ("", "wall", "CPU"):
        made.add_column(name, justify="right" if name else "left")
    for name in ("sbatch", "elastic-sbatch"):
        median = summary["medians"][name]
        made.add_row(name, f"{median['wall'] * 1000:.0f}", f"{median['cpu'] * 1000:.0f}", end_section=name != "sbatch")
    cells = [summary["compared"][kind] for kind in ("wall", "cpu")]
    spreads = [cell["added"] for cell in cells]
    made.add_row("ratio", *(f"{cell['ratio']:.1f}" for cell in cells))
    made.add_row("added (least to most)", *(_milliseconds(spread) for spread in spreads), end_section=True)
    floor = summary["medians"]["python -c pass"]
    made.add_row("of that, python -c pass", f"{floor['wall'] * 1000:.0f}", f"{floor['cpu'] * 1000:.0f}")
    return made


def _milliseconds(spread: dict[str, float]) -> str:
    return f"{spread['median'] * 1000:.0f} ({spread['min'] * 1000:.0f} to {spread['max'] * 1000:.0f})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  sudo benchmarks/submit.py                  # on a mini-slurm of its own\n"
        "  benchmarks/submit.py --here --pairs 30     # on the login node of a cluster, as yourself",
    )
    add = parser.add_argument
    add("--pairs", type=positive, default=15, metavar="N", help="submissions each way (default: 15)")
    add("--json", type=Path, metavar="FILE", help="write all figures and where they were measured")
    add("--here", action="store_true", help="use the Slurm of this machine, as the present user")
    add_state(parser)
    add("--raw", action="store_true", help="print the figures as JSON and nothing else")
    return parser.parse_args()


def measure_inside(state: Path, pairs: int) -> dict[str, Any]:
    """``measure`` as the unprivileged user of the mini-slurm in ``state``."""
    with cluster(state) as at:
        said = at.run(sys.executable, str(Path(__file__).resolve()), "--here", "--raw", f"--pairs={pairs}")
    inside: dict[str, Any] = json.loads(said)
    return inside


def main() -> int:
    args = parse_arguments()
    if not can_write(args.json):
        return 2
    try:
        if args.here:
            slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.split()
            report = {"machine": machine() | {"slurm": slurm[-1]}} | measure(args.pairs)
            report["summary"] = summarize(report["costs"])
        else:
            report = measure_inside(args.state, args.pairs)
    except (BenchmarkError, OSError) as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 1
    if args.raw:
        print(json.dumps(report))
        return 0
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 120).print(table(report["summary"]))
    modules, where = report["modules"], report["machine"]
    wrong = [name for name in NEVER if name in modules]
    print("imported: " + ", ".join(f"{name} {took:.0f} ms" for name, took in modules.items()))
    print(f"must not be imported: {', '.join(NEVER)}: {'FOUND ' + ', '.join(wrong) if wrong else 'none was'}")
    print(
        f"{where['date']}: Slurm {where['slurm']}, Python {where['python']}, {where['cores']} cores, of which others "
        f"used {report['busy_before']:.0%} before the runs; load average {where['load_average'][0]:.1f}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
