"""All benchmarks in one run of under 15 minutes: one table of ours against the named peers.

The parts run one after the other, those that need Slurm on one mini-slurm. A part that fails is named with its reason,
the others continue, and the exit code is 1. Ctrl-C keeps what was measured.
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
from _cluster import Cluster, cluster
from _launchers import FT, LIVE, OURS, OWN_STORE, install_ft_launcher, torch_214
from _month import Recovery
from _report import (
    ROOT,
    BenchmarkError,
    busy,
    figure,
    machine,
    parser_with,
    positive,
    show,
    table_of,
    write_json,
)
from recovery import COLD, FULL
from rich.table import Table

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks/run.py: begin -->", "<!-- benchmarks/run.py: end -->"

RECOVERY = [
    *(("worker", OURS, 60), ("worker", LIVE, 60), ("worker", OWN_STORE, 60), ("power", OURS, 60), ("power", LIVE, 60)),
    *(("agent", OURS, 60), ("agent", LIVE, 60), ("head", OURS, 60), ("head", LIVE, 60), ("worker", FT, 60)),
    *(("requeue", OURS, 60), ("worker", COLD, 60), ("agent", OWN_STORE, 90), ("power", OWN_STORE, 30)),
    *(("worker", FULL, 60), ("power", COLD, 60), ("head", OWN_STORE, 30)),
]
"""Fault, launcher, and how long to wait for a step before it counts as stuck, in seconds; the most informative
ones first. After a power loss, torchrun waits for the timeout of its process group, which is longer than this run.
"""
A_FAULT = 45.0
"""Seconds that a successful run takes in addition to its bound; a run is not started with less time left."""

PARTS = {
    "start": "start.py: the start of one worker, against torchrun",
    "submit": "submit.py: the submission of one job, against sbatch, torchx and submitit",
    "scale": "scale.py: rounds of up to 1,024 agents, against torch's c10d rendezvous; two to three minutes",
    "recovery": "recovery.py: each fault once, as far as time is left, against torchrun and ft_launcher",
    "cost": "live_cost.py: what training in place costs while nothing happens; a minute",
    "goodput": "goodput.py: the model of a month, with the recovery times of this run",
    "grow": "grow.py: one node more, against torchrun; two minutes more, not run by default",
}
ON_SLURM = {"submit", "recovery", "grow"}
DEFAULT = [part for part in PARTS if part != "grow"]
TITLES = ("what", "ours", "theirs", "theirs / ours", "peer", "")


class Run:
    """The requested parts, and their results so far."""

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
        yield start.measure(rounds=4, within=90)

    def _submit(self) -> Iterator[dict[str, Any]]:
        yield submit.measure_inside(self._cluster, rounds=7)

    def _scale(self) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "scale.json")
            command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), f"--json={results}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if results.exists():
                yield json.loads(results.read_text())
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("scale.py: ")]
            raise BenchmarkError(errors[-1] if errors else f"exit code {done.returncode}: {done.stderr[-500:]}")

    def _recovery(self) -> Iterator[dict[str, Any]]:
        at, runs, without = self._cluster, [], set()
        find: dict[str, Callable[[], list[str]]] = {
            FT: lambda: install_ft_launcher(at),
            LIVE: lambda: [f"--python={torch_214()}"],
        }
        for name, options in find.items():
            try:
                recovery.LAUNCHERS[name] = options()
            except BenchmarkError as error:
                without.add(name)
                self.failed[name] = str(error)
        where = recovery.where_it_runs(at)
        for rung, launcher, bound in RECOVERY:
            if launcher in without:
                continue
            queue = recovery.QUEUE_BOUND * (rung in recovery.THROUGH_THE_QUEUE)
            if time.monotonic() + bound + queue + A_FAULT > self._ends:
                self.say(f"{rung} {launcher} left out: too little time is left; --minutes gives more")
                continue
            run = recovery.measure(at, rung, launcher, bound, None)
            self.say(recovery.line(run))
            runs.append(run)
            yield recovery.report(runs, where)

    def _goodput(self) -> Iterator[dict[str, Any]]:
        measured = self.found.get("recovery")
        times = Recovery.of(measured["summary"]) if measured else Recovery()
        yield goodput.report(goodput.SIZES, seeds=20, recovery=times)

    def _cost(self) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "cost.json")
            command = [str(torch_214()), str(ROOT / "bin" / "elastic-srun"), "--local=2", "--nproc-per-node=1"]
            command += [f"--log-dir={folder}", str(ROOT / "benchmarks" / "live_cost.py"), f"--json={results}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not results.exists():
                raise BenchmarkError(f"live_cost.py: exit code {done.returncode}: {done.stderr[-500:]}")
            found = json.loads(results.read_text())
        step, cost = 1000 * found["step"], 1000 * found["cost"]
        note = f"{cost / step:.1%} more, over {found['rounds']} rounds"
        line = figure("a short step in place", step + cost, "the same without live", step, unit="ms", note=note)
        yield found | {"table": [line]}

    def _grow(self) -> Iterator[dict[str, Any]]:
        runs: list[grow.Change] = []
        launchers = [OURS, LIVE, OWN_STORE]
        options = grow.how_to_submit(self._cluster, launchers)
        for launcher in launchers:
            for run in grow.measure(self._cluster, launcher, options[launcher], 45, None):
                self.say(grow.line(run))
                runs.append(run)
                rows = grow.summarize(runs)
                yield {"summary": rows, "table": grow.lines(rows, version("torch"))}


def cells(line: dict[str, Any]) -> list[str]:
    """The cells of one line of the table, under ``TITLES``."""
    ours, theirs = (
        "-" if line[side] is None else f"{figures(line[side])} {line['unit']}" for side in ("ours", "theirs")
    )
    ratio = "" if line["ratio"] is None else f"x {figures(line['ratio'])}"
    return [line["name"], ours, theirs, ratio, line["peer"], line["note"]]


def figures(value: float) -> str:
    """Two or three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"


def table(lines: Sequence[dict[str, Any]]) -> Table:
    made = table_of("ours against the peers, medians", TITLES, left=("what", "peer", ""))
    for line in lines:
        made.add_row(*cells(line))
    return made


def markdown(lines: Sequence[dict[str, Any]], about: str) -> str:
    rows = ["| " + " | ".join(TITLES).rstrip() + " |", "|---|--:|--:|--:|---|---|"]
    rows += ["| " + " | ".join(cells(line)).rstrip() + " |" for line in lines]
    return "\n".join([about, "", *rows])


def write_page(page: Path, text: str) -> None:
    """Put ``text`` between the marks on ``page``. Raises BenchmarkError if ``page`` has no marks."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"{page}: expected the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def versions(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The versions of all that took part."""
    numbers = {"torch": version("torch"), "elastic_hpc": version("elastic_hpc")}
    for report in found.values():
        where = report.get("machine", {})
        numbers |= {{"slurm": "Slurm"}.get(name, name): where[name] for name in ("slurm", FT) if name in where}
        numbers |= report.get("versions", {})
    return numbers


def about(report: dict[str, Any]) -> str:
    """A few sentences on what was measured on which machine."""
    where = report["machine"]
    peers = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
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
        "sudo benchmarks/run.py --json all.json --write-docs     # what docs/performance.md shows",
        "benchmarks/run.py --only start goodput                  # these need neither Slurm nor root",
        state=True,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=DEFAULT, metavar="PART", help="default: all but grow")
    add("--minutes", type=positive, default=14, metavar="N", help="begin no fault that may end later (default: 14)")
    add("--write-docs", action="store_true", help="put the table into docs/performance.md")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
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
    write_json(args.json, report)
    show(table(lines), width=170)
    print(about(report))
    if args.write_docs and lines:
        write_page(PAGE, markdown(lines, about(report)))
    return int(stopped or bool(run.failed))


if __name__ == "__main__":
    sys.exit(main())
