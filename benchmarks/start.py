"""What it costs to start: seconds from the start of the launcher to the first line of the worker's script, to the
script with torch imported, and to the end, in interleaved rounds of elastic-srun, torchrun and python alone.

One node, one worker, no Slurm; a script that imports torch and ends. Needs neither Slurm nor root.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _launchers import OURS, TORCHRUN_MODULE
from _processes import import_times, run_timed
from _report import (
    BenchmarkError,
    busy,
    figure,
    machine,
    origin,
    parser_with,
    positive,
    run_main,
    show,
    spread,
    spread_text,
    table_of,
    write_json,
)
from rich.table import Table

SCRIPT = """
import time
first = time.time()
import json, sys
import torch
with open(sys.argv[1], "w") as file:
    json.dump({"first": first, "torch": time.time()}, file)
"""
LAUNCHERS = {
    OURS: ["elastic-srun", "--standalone", "--nproc-per-node=1"],
    "elastic-cold": ["elastic-srun", "--standalone", "--nproc-per-node=1", "--preload=off"],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node=1"],
    "python": ["python"],
}
AGENTS = {OURS: "elastic_hpc.agent.main", "torchrun": TORCHRUN_MODULE}
"""The modules that the agents of each launcher import first."""
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
    """Raises BenchmarkError if the launcher did not run the script to its end."""
    program, *options = LAUNCHERS[launcher]
    written = folder / "times.json"
    written.unlink(missing_ok=True)
    ran = run_timed(
        [str(Path(sys.executable).with_name(program)), *options, str(folder / "script.py"), str(written)], cwd=folder
    )
    if ran.exit_code or not written.exists():
        raise BenchmarkError(f"{launcher}: exit code {ran.exit_code}: {ran.output.strip() or 'no output'}")
    times = json.loads(written.read_text())
    return Start(times["first"] - ran.began, times["torch"] - ran.began, ran.wall, ran.cpu)


def measure(rounds: int, within: float = math.inf) -> dict[str, Any]:
    """Start ``rounds`` times each way, interleaved; no round starts later than ``within`` seconds."""
    others = busy()
    ends = time.monotonic() + within
    starts: dict[str, list[Start]] = {launcher: [] for launcher in LAUNCHERS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(SCRIPT)
        for count in range(-1, rounds):  # the first, which fills the file cache, does not count
            if count > 0 and time.monotonic() > ends:
                break
            for launcher in LAUNCHERS if count % 2 else reversed(LAUNCHERS):
                measured = start(launcher, Path(folder))
                if count >= 0:
                    starts[launcher].append(measured)
    modules = {}
    for launcher, module in AGENTS.items():
        import_it = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
        modules[launcher] = import_times(subprocess.run(import_it, capture_output=True, text=True, check=True).stderr)
    report: dict[str, Any] = {
        "machine": machine(),
        "busy_before": others,
        "starts": {launcher: list(map(asdict, many)) for launcher, many in starts.items()},
        "summary": {
            launcher: {phase: spread(getattr(measured, phase) for measured in many) for phase in PHASES}
            for launcher, many in starts.items()
        },
        "modules": modules,
    }
    return report | {"table": lines(report)}


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
    made = table_of("seconds from the start of the launcher, median (least to most)", ("", *PHASES.values()))
    for launcher, phases in summary.items():
        cells = []
        for phase in PHASES:
            ratio = phases[phase]["median"] / summary[OURS][phase]["median"]
            cells.append(spread_text(phases[phase], 2) + ("" if launcher == OURS else f"\nx {ratio:.2f} of ours"))
        made.add_row(launcher, *cells)
    return made


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(__doc__, {})
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="starts of each (default: 7)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    report = measure(args.rounds)
    write_json(args.json, report)
    show(table(report["summary"]))
    for launcher, modules in report["modules"].items():
        most = ", ".join(f"{name} {took:.0f} ms" for name, took in list(modules.items())[:8])
        print(f"imported by {AGENTS[launcher]}, from outside the standard library: {most}")
    print(origin(report["machine"], [report["busy_before"]]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
