"""What it costs to submit the same job: sbatch, elastic-sbatch, torchx and submitit, in interleaved rounds.

sbatch is given the script that elastic-sbatch makes, so both submit the same thing; the others have a job of as many
nodes run the same script. Jobs wait, and are cancelled after each round. Runs as the unprivileged user of mini-slurm,
or with --here on any machine that has sbatch.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _cluster import (
    ROOT,
    BenchmarkError,
    Cluster,
    add_state,
    busy,
    can_write,
    cluster,
    figure,
    import_times,
    installed,
    machine,
    positive,
    spread,
    wait_for,
)
from rich.console import Console
from rich.table import Table

SCRIPT = [str(ROOT / "examples" / "train_digits.py"), "--epochs", "3"]
JOB = ["--hold", "--nodes=2:4", *SCRIPT]
OURS, PEERS = "elastic-sbatch", ("sbatch", "submitit", "torchx")
FLOOR, SUBMITIT_OURS = "python -c pass", "submitit, elastic"
SUBMITIT = """
import sys
from submitit import AutoExecutor
from submitit.helpers import CommandFunction
executor = AutoExecutor("submitit", cluster=sys.argv[1])
executor.update_parameters(nodes=4, tasks_per_node=1, timeout_min=10, slurm_additional_parameters={"hold": True})
print("job", executor.submit(CommandFunction([sys.executable, *sys.argv[2:]])).job_id)
"""
ID = r"^(?:job |slurm://torchx/)?(\d+)$"
"""A job's id, as each of them prints it."""
NEVER = ("torch", "submitit")
"""Modules that a submission must not import."""


@dataclass(frozen=True)
class Cost:
    """One process with all that it started and waited for, in seconds."""

    wall: float
    cpu: float


def run(argv: Sequence[str], *, submits: bool = False) -> tuple[Cost, str]:
    """Run to the end: what it took, and what it printed. BenchmarkError if it failed. What ``submits`` and has told a
    job's id has done so, whatever it does later: torchx then asks for accounting, which not every Slurm has.
    """
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(argv, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode and not (submits and re.search(ID, text, re.MULTILINE)):
        raise BenchmarkError(f"{' '.join(argv)}: exit code {process.returncode}: {text.strip()}")
    return Cost(wall, used.ru_utime + used.ru_stime), text


def ways(script: Path, torchx: Path | None) -> dict[str, list[str]]:
    """How to submit; ``torchx``: the folder in which it is installed."""
    submitit = [sys.executable, "-c", SUBMITIT]
    found = {
        "sbatch": ["sbatch", "--parsable", str(script)],
        OURS: [*_ours(), *JOB],
        "submitit": [*submitit, "slurm", *SCRIPT],
        SUBMITIT_OURS: [*submitit, "elastic", *SCRIPT],
    }
    if torchx:
        start = ["env", f"PYTHONPATH={torchx}", sys.executable, str(torchx / "bin" / "torchx"), "run", "-s", "slurm"]
        job = ["dist.ddp", "-j", "4x1", "--cpu", "1", "--memMB", "200", "--script", SCRIPT[0], "--", *SCRIPT[1:]]
        found["torchx"] = [*start, *job]
    return found | {FLOOR: [sys.executable, "-c", "pass"]}


def _ours() -> list[str]:
    return [str(Path(sys.executable).with_name(OURS)), "--parsable"]


def measure(rounds: int, torchx: Path | None) -> dict[str, Any]:
    """Submit ``rounds`` times each way, and take the jobs back."""
    others = busy()
    jobs: list[str] = []
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        os.chdir(folder)
        script = Path(folder, "job.sbatch")
        script.write_text(run([*_ours(), "--dry-run", *JOB])[1])
        commands = ways(script, torchx)
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        try:
            for count in range(-1, rounds):  # the first, which fills the file cache, does not count
                for name in commands if count % 2 else reversed(commands):
                    cost, said = run(commands[name], submits=name != FLOOR)
                    if name != FLOOR:
                        jobs += _submitted(name, said)
                    if count >= 0:
                        costs[name].append(cost)
                _expect_in_queue(jobs)
                run(["scancel", *jobs])
                jobs.clear()
            modules = imported(
                [sys.executable, "-X", "importtime", "-m", "elastic_hpc.cli.sbatch", "--parsable", *JOB], jobs
            )
        finally:
            if jobs:
                run(["scancel", *jobs])
            os.chdir("/")
    return {
        "busy_before": others,
        "versions": {"submitit": version("submitit")} | ({"torchx": installed(torchx, "torchx")} if torchx else {}),
        "costs": {name: [asdict(cost) for cost in many] for name, many in costs.items()},
        "modules": modules,
    }


def _submitted(name: str, said: str) -> list[str]:
    found = re.findall(ID, said, re.MULTILINE)
    if not found:
        raise BenchmarkError(f"{name}: expected the id of a job, found {said.strip()!r}")
    return found[:1]


def _expect_in_queue(jobs: Sequence[str]) -> None:
    """BenchmarkError unless slurmctld knows all ``jobs``."""
    _, said = run(["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"])
    missing = set(jobs) - {line.partition("+")[0].partition("_")[0] for line in said.split()}
    if missing:
        raise BenchmarkError(f"jobs {', '.join(sorted(missing))}: told by their launchers, unknown to Slurm")


def imported(argv: Sequence[str], jobs: list[str]) -> dict[str, float]:
    """Packages outside the standard library that a submission imports, with the milliseconds that each took itself."""
    _, said = run(argv)
    jobs += re.findall(ID, said, re.MULTILINE)
    return import_times(said)


def summarize(costs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each way; ratios as medians over the rounds, so that a drift of the load cancels."""
    ways = {}
    for name, many in costs.items():
        found: dict[str, Any] = {kind: statistics.median(cost[kind] for cost in many) for kind in ("wall", "cpu")}
        for kind in ("wall", "cpu"):
            for other in ("sbatch", OURS):
                pairs = zip(many, costs[other], strict=True)
                found[f"{kind}_of_{other}"] = statistics.median(one[kind] / its[kind] for one, its in pairs)
        ways[name] = found
    added = {}
    for kind in ("wall", "cpu"):
        pairs = zip(costs[OURS], costs["sbatch"], strict=True)
        added[kind] = spread(ours[kind] - theirs[kind] for ours, theirs in pairs)
    return {"rounds": len(costs[OURS]), "ways": ways, "added": added}


def lines(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For run.py's table."""
    ways, shown = report["summary"]["ways"], []
    for name, kind in ((name, kind) for name in PEERS for kind in ("wall", "cpu")):
        cost = ways.get(name)
        known = {"slurm": report["machine"]["slurm"]} | report["versions"]
        note = "the same script" if name == "sbatch" else "" if cost else report["left_out"][name]
        peer = f"{name} {known.get('slurm' if name == 'sbatch' else name, '')}".strip()
        ours, theirs = (one[kind] * 1000 if one else None for one in (ways[OURS], cost))
        what = f"submit a job, {'CPU' if kind == 'cpu' else 'wall'}"
        shown.append(figure(what, ours, peer, theirs, unit="ms", note=note))
    return shown


def table(summary: dict[str, Any]) -> Table:
    made = Table(title=f"milliseconds, medians of {summary['rounds']} interleaved rounds", title_justify="left")
    for name in ("", "wall", "of sbatch", "of ours", "CPU", "of sbatch", "of ours"):
        made.add_column(name, justify="right" if name else "left")
    for name, cost in summary["ways"].items():
        cells = []
        for kind in ("wall", "cpu"):
            cells += [
                f"{cost[kind] * 1000:.0f}",
                f"x {cost[f'{kind}_of_sbatch']:.1f}",
                f"x {cost[f'{kind}_of_{OURS}']:.2f}",
            ]
        made.add_row(name, *cells)
    made.add_section()
    wall, cpu = (_milliseconds(summary["added"][kind]) for kind in ("wall", "cpu"))
    made.add_row("elastic-sbatch adds (least to most)", wall, "", "", cpu)
    return made


def _milliseconds(spread: dict[str, float]) -> str:
    return f"{spread['median'] * 1000:.0f} ({spread['min'] * 1000:.0f} to {spread['max'] * 1000:.0f})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  sudo benchmarks/submit.py                  # on a mini-slurm of its own\n"
        "  benchmarks/submit.py --here --rounds 30    # on the login node of a cluster, as yourself",
    )
    add = parser.add_argument
    add("--rounds", type=positive, default=15, metavar="N", help="submissions each way (default: 15)")
    add("--json", type=Path, metavar="FILE", help="write all figures and where they were measured")
    add("--here", action="store_true", help="use the Slurm of this machine, as the present user")
    text = (
        "with --here: the folder in which pip has installed torchx (--target); its jobs start unless the queue is full"
    )
    add("--torchx", type=Path, metavar="DIR", help=text)
    add_state(parser)
    add("--raw", action="store_true", help="print the figures as JSON and nothing else")
    return parser.parse_args()


def install_torchx(at: Cluster) -> Path:
    """Into a folder of the cluster's user, with all that it needs in its versions."""
    folder = at.home / "torchx"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", f"--target={folder}", "torchx"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(
            f"torchx does not install here: {(done.stderr.strip() or 'pip said nothing').splitlines()[-1]}"
        )
    return folder


def measure_inside(at: Cluster, rounds: int) -> dict[str, Any]:
    """``measure`` as the user of a mini-slurm, whose nodes another job has, so that torchx's, never held, wait."""
    left_out = {}
    options = [f"--rounds={rounds}"]
    try:
        options.append(f"--torchx={install_torchx(at)}")
    except BenchmarkError as error:
        left_out["torchx"] = str(error)
    at.reset()
    nodes = f"--nodes={len(at.nodes)}"
    at.run("sbatch", nodes, "--exclusive", "--output=/dev/null", "--wrap=exec sleep 900", cwd=at.home)
    try:
        wait_for(
            "all nodes to be taken", lambda: "R" in at.run("squeue", "--noheader", "--format=%t").split() or None, 60
        )
        said = at.run(sys.executable, str(Path(__file__).resolve()), "--here", "--raw", *options)
    finally:
        at.reset()
    inside: dict[str, Any] = json.loads(said)
    inside["left_out"] |= left_out
    return inside | {"table": lines(inside)}


def main() -> int:
    args = parse_arguments()
    if not can_write(args.json):
        return 2
    try:
        if args.here:
            slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.split()
            report = {"machine": machine() | {"slurm": slurm[-1]}} | measure(args.rounds, args.torchx)
            report |= {
                "summary": summarize(report["costs"]),
                "left_out": {} if args.torchx else {"torchx": "not given"},
            }
        else:
            with cluster(args.state) as at:
                report = measure_inside(at, args.rounds)
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
    for name, why in report["left_out"].items():
        print(f"{name} left out: {why}")
    print("imported: " + ", ".join(f"{name} {took:.0f} ms" for name, took in modules.items()))
    print(f"must not be imported: {', '.join(NEVER)}: {'FOUND ' + ', '.join(wrong) if wrong else 'none was'}")
    print(
        f"{where['date']}: Slurm {where['slurm']}, Python {where['python']}, "
        + "".join(f"{name} {which}, " for name, which in report["versions"].items())
        + f"{where['cores']} cores, of which others "
        f"used {report['busy_before']:.0%} before the runs; load average {where['load_average'][0]:.1f}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
