"""What it costs to start: seconds from the start of the launcher to the first line of the worker's script, to the
script with torch imported, and to the end, in interleaved rounds of elastic-srun, torchrun and python alone.

One node, one worker, no Slurm; a script that imports torch and ends. Needs neither Slurm nor root.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _cluster import BenchmarkError, busy, can_write, figure, import_times, machine, positive, spread, spread_text
from rich.console import Console
from rich.table import Table

SCRIPT = """
import time
first = time.time()
import json, sys
import torch
with open(sys.argv[1], "w") as file:
    json.dump({"first": first, "torch": time.time()}, file)
"""
OURS = "elastic"
LAUNCHERS = {
    OURS: ["elastic-srun", "--standalone", "--nproc-per-node=1"],
    "elastic-cold": ["elastic-srun", "--standalone", "--nproc-per-node=1", "--preload=off"],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node=1"],
    "python": ["python"],
}
AGENTS = {OURS: "elastic_hpc.agent", "torchrun": "torch.distributed.run"}
"""What their agents import first."""
PHASES = {
    "first": "to the script's first line",
    "torch": "to the script with torch imported",
    "wall": "to the end of the launcher",
    "cpu": "CPU of all that it started",
}


@dataclass(frozen=True)
class Start:
    """One start, in seconds from just before the launcher's process."""

    first: float
    torch: float
    wall: float
    cpu: float


def start(launcher: str, folder: Path) -> Start:
    """BenchmarkError if it did not run the script to its end."""
    program, *options = LAUNCHERS[launcher]
    told = folder / "times.json"
    told.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name(program)), *options, str(folder / "script.py"), str(told)]
    with tempfile.TemporaryFile() as said:
        began = time.time()
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        ended = time.time()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode or not told.exists():
        raise BenchmarkError(f"{launcher}: exit code {process.returncode}: {text.strip() or 'it said nothing'}")
    times = json.loads(told.read_text())
    return Start(times["first"] - began, times["torch"] - began, ended - began, used.ru_utime + used.ru_stime)


def measure(rounds: int, within: float = math.inf) -> dict[str, Any]:
    """Start ``rounds`` times each way, interleaved; no further round is begun after ``within`` seconds."""
    others = busy()
    ends = time.monotonic() + within
    starts: dict[str, list[Start]] = {launcher: [] for launcher in LAUNCHERS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(SCRIPT)
        for count in range(-1, rounds):  # the first, which fills the file cache, does not count
            if count > 0 and time.monotonic() > ends:
                break
            for launcher in LAUNCHERS if count % 2 else reversed(LAUNCHERS):
                found = start(launcher, Path(folder))
                if count >= 0:
                    starts[launcher].append(found)
    modules = {}
    for launcher, module in AGENTS.items():
        import_it = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
        modules[launcher] = import_times(subprocess.run(import_it, capture_output=True, text=True, check=True).stderr)
    return {
        "machine": machine(),
        "busy_before": others,
        "starts": {launcher: [asdict(one) for one in many] for launcher, many in starts.items()},
        "summary": {
            launcher: {phase: spread(getattr(one, phase) for one in many) for phase in PHASES}
            for launcher, many in starts.items()
        },
        "modules": modules,
    }


def lines(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For run.py's table."""
    summary, peer = report["summary"], f"torchrun {report['machine']['torch']}"
    shown = []
    for phase, what in PHASES.items():
        ours, cold, theirs = (summary[name][phase]["median"] for name in (OURS, "elastic-cold", "torchrun"))
        note = f"with --preload=off {cold:.2f}"
        shown.append(figure(f"start, one node: {what}", ours, peer, theirs, note=note))
    return shown


def table(summary: dict[str, Any]) -> Table:
    made = Table(title="seconds from the start of the launcher, median (least to most)", title_justify="left")
    for name in ("", *PHASES.values()):
        made.add_column(name, justify="right" if name else "left")
    for launcher, phases in summary.items():
        cells = []
        for phase in PHASES:
            ratio = phases[phase]["median"] / summary[OURS][phase]["median"]
            cells.append(spread_text(phases[phase], 2) + ("" if launcher == OURS else f"\nx {ratio:.2f} of ours"))
        made.add_row(launcher, *cells)
    return made


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=positive, default=7, metavar="N", help="starts of each (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write all figures and where they were measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    if not can_write(args.json):
        return 2
    try:
        report = measure(args.rounds)
    except (BenchmarkError, OSError) as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 1
    report["table"] = lines(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 140).print(table(report["summary"]))
    for launcher, modules in report["modules"].items():
        most = ", ".join(f"{name} {took:.0f} ms" for name, took in list(modules.items())[:8])
        print(f"imported by {AGENTS[launcher]}, from outside the standard library: {most}")
    where = report["machine"]
    print(
        f"{where['date']}: torch {where['torch']}, Python {where['python']}, {where['cores']} cores, of which others "
        f"used {report['busy_before']:.0%} before the runs; load average {where['load_average'][0]:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
