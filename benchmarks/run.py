"""All benchmarks in one run of under 15 minutes: one table of ours against the named peers.

The parts run one after the other, those that need Slurm on one mini-slurm. A part that fails is named with its reason,
the others go on, and the exit code is 1. Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import goodput
import grow
import recovery
import start
import submit
from _cluster import (
    FT,
    ROOT,
    BenchmarkError,
    Cluster,
    add_state,
    busy,
    can_write,
    cluster,
    install_ft_launcher,
    machine,
    parser_with,
    positive,
)
from rich.console import Console
from rich.table import Table

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/run.py: begin -->", "<!-- benchmarks/run.py: end -->"

OURS, COLD, FULL, OWN_STORE = recovery.OURS, recovery.COLD, recovery.FULL, "torchrun-own-store"
RECOVERY = [
    *(("worker", OURS, 60), ("worker", OWN_STORE, 60), ("power", OURS, 60), ("head", OURS, 60), ("worker", FULL, 60)),
    *(("requeue", OURS, 60), ("worker", COLD, 60), ("agent", OURS, 60), ("agent", OWN_STORE, 90)),
    *(("power", OWN_STORE, 30), ("worker", FT, 60), ("power", COLD, 60), ("head", OWN_STORE, 30)),
]
"""Fault, launcher, and how long to wait for a step before it counts as stuck, in seconds; the most telling ones first.
torchrun after a power loss waits for its process group, which is longer than this run.
"""
A_FAULT = 45.0
"""Seconds that a run takes beside its bound where nothing goes wrong: it is not begun with less time left."""

PARTS = {
    "start": "start.py: the start of one worker, against torchrun",
    "submit": "submit.py: the submission of one job, against sbatch, torchx and submitit",
    "scale": "scale.py: rounds of up to 1,024 agents, against torch's c10d rendezvous; two to three minutes",
    "recovery": "recovery.py: each fault once, as far as time is left, against torchrun and ft_launcher",
    "goodput": "goodput.py: the model of a month, with the recovery times of this run",
    "grow": "grow.py: one node more, against torchrun; two minutes more, not run by default",
}
ON_SLURM = {"submit", "recovery", "grow"}
DEFAULT = [part for part in PARTS if part != "grow"]
TITLES = ("what", "ours", "theirs", "theirs / ours", "peer", "")


class Run:
    """The parts that are asked for, and what they have found so far."""

    def __init__(self, at: Cluster | None, minutes: int) -> None:
        self._at = at
        self._began = time.monotonic()
        self._ends = self._began + minutes * 60
        self.found: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def measure(self, parts: Sequence[str]) -> None:
        for part in parts:
            self.say(PARTS[part])
            measure: Callable[[], Iterator[dict[str, Any]]] = getattr(self, f"_{part}")
            try:
                for report in measure():  # of all so far
                    self.found[part] = report
            except (BenchmarkError, OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
                self.failed[part] = str(error) or repr(error)
                self.say(f"{part} failed: {self.failed[part]}")

    def say(self, text: str) -> None:
        print(f"+{time.monotonic() - self._began:.0f} s {text}", flush=True)

    @functools.cached_property
    def _cluster(self) -> Cluster:
        if not self._at:
            raise BenchmarkError("it needs a mini-slurm")
        return self._at

    def _start(self) -> Iterator[dict[str, Any]]:
        yield _with_table(start.measure(rounds=4, within=90), start.lines)

    def _submit(self) -> Iterator[dict[str, Any]]:
        yield submit.measure_inside(self._cluster, rounds=7)

    def _scale(self) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder, "scale.json")
            command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), f"--json={told}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if told.exists():
                yield json.loads(told.read_text())
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("scale.py: ")]
            raise BenchmarkError(said[-1] if said else f"exit code {done.returncode}: {done.stderr[-500:]}")

    def _recovery(self) -> Iterator[dict[str, Any]]:
        at, runs, without = self._cluster, [], set()
        try:
            recovery.LAUNCHERS[FT] = install_ft_launcher(at)
        except BenchmarkError as error:
            without.add(FT)
            self.failed[FT] = str(error)
        where = recovery.where_it_runs(at)
        for rung, launcher, bound in RECOVERY:
            if launcher in without:
                continue
            queue = recovery.QUEUE_BOUND * (rung in recovery.THROUGH_THE_QUEUE)
            if time.monotonic() + bound + queue + A_FAULT > self._ends:
                self.say(f"{rung} {launcher} left out: too little time is left; --minutes gives more")
                continue
            run = recovery.measure(at, rung, launcher, at.nodes[2], bound, None)
            self.say(recovery.told(run))
            runs.append(run)
            yield recovery.report(runs, where)

    def _goodput(self) -> Iterator[dict[str, Any]]:
        measured = self.found.get("recovery")
        times = goodput.Recovery.of(measured["summary"]) if measured else goodput.Recovery()
        yield goodput.report(goodput.SIZES, seeds=20, found=times)

    def _grow(self) -> Iterator[dict[str, Any]]:
        runs: list[grow.Change] = []
        launchers = [grow.OURS, grow.OWN_STORE]
        options = grow.how_to_submit(self._cluster, launchers)
        for launcher in launchers:
            for run in grow.measure(self._cluster, launcher, options[launcher], 45, None):
                self.say(grow.told(run))
                runs.append(run)
                rows = grow.summarize(runs)
                yield {"summary": rows, "table": grow.lines(rows, version("torch"))}


def _with_table(report: dict[str, Any], lines: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Any]:
    return report | {"table": lines(report)}


def cells(line: dict[str, Any]) -> list[str]:
    """Of one line of the table, under ``TITLES``."""
    ours, theirs = (
        "-" if line[side] is None else f"{figures(line[side])} {line['unit']}" for side in ("ours", "theirs")
    )
    ratio = "" if line["ratio"] is None else f"x {figures(line['ratio'])}"
    return [line["name"], ours, theirs, ratio, line["peer"], line["note"]]


def figures(value: float) -> str:
    """Two or three figures that count, and no exponent."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"


def table(lines: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="ours against the peers, medians", title_justify="left")
    for title in TITLES:
        made.add_column(title, justify="right" if "ours" in title or title == "theirs" else "left")
    for line in lines:
        made.add_row(*cells(line))
    return made


def markdown(lines: Sequence[dict[str, Any]], about: str) -> str:
    rows = ["| " + " | ".join(TITLES).rstrip() + " |", "|---|--:|--:|--:|---|---|"]
    rows += ["| " + " | ".join(cells(line)).rstrip() + " |" for line in lines]
    return "\n".join([about, "", *rows])


def write_page(page: Path, text: str) -> None:
    """Put ``text`` between the marks on ``page``. BenchmarkError if it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"{page}: expected the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def versions(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of all that took part."""
    known = {"torch": version("torch"), "elastic_hpc": version("elastic_hpc")}
    for report in found.values():
        where = report.get("machine", {})
        known |= {name: where[name] for name in ("slurm", FT) if name in where}
        known |= report.get("versions", {})
    return {{"slurm": "Slurm"}.get(name, name): which for name, which in known.items()}


def about(report: dict[str, Any]) -> str:
    """In a few sentences what was measured where."""
    where = report["machine"]
    peers = ", ".join(f"{name} {which}" for name, which in report["versions"].items())
    missing = f" Failed: {', '.join(report['failed'])}." if report["failed"] else ""
    took = f"{report['seconds'] / 60:.0f} minutes"
    return (
        f"`benchmarks/run.py`, {where['date']}, {took}: {peers}, Python {where['python']}, "
        f"{where['cores']} cores, of which others used {report['busy_before']:.0%} before it began.{missing}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"parts:": "", **PARTS},
        "run.py --json all.json --write-docs     # what docs/performance.md shows",
        "run.py --only start goodput             # these need neither Slurm nor root",
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=DEFAULT, metavar="PART", help="default: all but grow")
    add("--minutes", type=positive, default=14, metavar="N", help="begin no fault that may end later (default: 14)")
    add("--json", type=Path, metavar="FILE", help="write all figures, the table and where it was measured")
    add("--write-docs", action="store_true", help="put the table into docs/performance.md")
    add_state(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if not can_write(args.json):
        return 2
    began, others, where = time.monotonic(), busy(), machine()
    parts = [part for part in PARTS if part in args.only]
    stopped = False
    run = Run(None, args.minutes)
    try:
        with contextlib.ExitStack() as stack:
            at = stack.enter_context(cluster(args.state)) if ON_SLURM & set(parts) else None
            run = Run(at, args.minutes)
            run.measure(parts)
    except BenchmarkError as error:
        print(f"run.py: {error}", file=sys.stderr)
        if not run.found:
            return 1
    except KeyboardInterrupt:
        stopped = True
        run.say("stopped; what was measured:")
    lines = [line for part in PARTS for line in run.found.get(part, {}).get("table", [])]
    report = {
        "machine": where,
        "busy_before": others,
        "seconds": time.monotonic() - began,
        "versions": versions(run.found),
        "failed": run.failed,
        "table": lines,
        "parts": run.found,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 170).print(table(lines))
    print(about(report))
    if args.write_docs and lines:
        write_page(PAGE, markdown(lines, about(report)))
    return int(stopped or bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
