"""What it costs to submit the same job: sbatch, elastic-sbatch, torchx and submitit, in interleaved rounds.

sbatch submits the script that elastic-sbatch makes, so both submit the same job; the others run the same script in a
job of as many nodes. Jobs wait, and are cancelled after each round. Runs as the unprivileged user of mini-slurm, or
with --here on any machine that has sbatch.
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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _cluster import Cluster, cluster, wait_for
from _launchers import installed, pip_install
from _processes import Ran, import_times, run_timed
from _report import (
    ROOT,
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
"""A job's id, as each command prints it."""
NEVER = ("torch", "submitit")
"""Modules that a submission must not import."""


def run(argv: Sequence[str], *, submits: bool = False) -> Ran:
    """Run a command to its end. Raises BenchmarkError if it failed; a command that ``submits`` has succeeded once it
    has printed the id of a job: afterwards torchx asks for accounting, which not every Slurm has.
    """
    ran = run_timed(argv)
    if ran.exit_code and not (submits and re.search(ID, ran.output, re.MULTILINE)):
        raise BenchmarkError(f"{' '.join(argv)}: exit code {ran.exit_code}: {ran.output.strip()}")
    return ran


def ways(script: Path, torchx: Path | None) -> dict[str, list[str]]:
    """The command of each way to submit; ``torchx``: the folder in which torchx is installed."""
    submitit = [sys.executable, "-c", SUBMITIT]
    commands = {
        "sbatch": ["sbatch", "--parsable", str(script)],
        OURS: [*_ours(), *JOB],
        "submitit": [*submitit, "slurm", *SCRIPT],
        SUBMITIT_OURS: [*submitit, "elastic", *SCRIPT],
    }
    if torchx:
        start = ["env", f"PYTHONPATH={torchx}", sys.executable, str(torchx / "bin" / "torchx"), "run", "-s", "slurm"]
        job = ["dist.ddp", "-j", "4x1", "--cpu", "1", "--memMB", "200", "--script", SCRIPT[0], "--", *SCRIPT[1:]]
        commands["torchx"] = [*start, *job]
    return commands | {FLOOR: [sys.executable, "-c", "pass"]}


def _ours() -> list[str]:
    return [str(Path(sys.executable).with_name(OURS)), "--parsable"]


def measure(rounds: int, torchx: Path | None) -> dict[str, Any]:
    """Submit ``rounds`` times each way, and cancel the jobs."""
    others = busy()
    jobs: list[str] = []
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        os.chdir(folder)
        script = Path(folder, "job.sbatch")
        script.write_text(run([*_ours(), "--dry-run", *JOB]).output)
        commands = ways(script, torchx)
        costs: dict[str, list[Ran]] = {name: [] for name in commands}
        try:
            for count in range(-1, rounds):  # the first, which fills the file cache, does not count
                for name in commands if count % 2 else reversed(commands):
                    ran = run(commands[name], submits=name != FLOOR)
                    if name != FLOOR:
                        jobs += _submitted(name, ran.output)
                    if count >= 0:
                        costs[name].append(ran)
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
        "costs": {name: [{"wall": ran.wall, "cpu": ran.cpu} for ran in many] for name, many in costs.items()},
        "modules": modules,
    }


def _submitted(name: str, output: str) -> list[str]:
    ids = re.findall(ID, output, re.MULTILINE)
    if not ids:
        raise BenchmarkError(f"{name}: expected the id of a job, found {output.strip()!r}")
    return ids[:1]


def _expect_in_queue(jobs: Sequence[str]) -> None:
    """BenchmarkError unless slurmctld knows all ``jobs``."""
    queue = run(["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"]).output
    missing = set(jobs) - {line.partition("+")[0].partition("_")[0] for line in queue.split()}
    if missing:
        raise BenchmarkError(f"jobs {', '.join(sorted(missing))}: printed by their launchers, unknown to Slurm")


def imported(argv: Sequence[str], jobs: list[str]) -> dict[str, float]:
    """Packages outside the standard library that a submission imports, with the milliseconds of each package alone."""
    output = run(argv).output
    jobs += re.findall(ID, output, re.MULTILINE)
    return import_times(output)


def summarize(costs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The median of each way; ratios are medians over the rounds, so that a drift of the load cancels out."""
    ways = {}
    for name, many in costs.items():
        way: dict[str, Any] = {kind: statistics.median(cost[kind] for cost in many) for kind in ("wall", "cpu")}
        for kind in ("wall", "cpu"):
            for base in ("sbatch", OURS):
                pairs = zip(many, costs[base], strict=True)
                way[f"{kind}_of_{base}"] = statistics.median(mine[kind] / other[kind] for mine, other in pairs)
        ways[name] = way
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
        versions = {"sbatch": report["machine"]["slurm"]} | report["versions"]
        note = "the same script" if name == "sbatch" else "" if cost else report["left_out"][name]
        peer = f"{name} {versions.get(name, '')}".strip()
        ours, theirs = (way[kind] * 1000 if way else None for way in (ways[OURS], cost))
        what = f"submit a job, {'CPU' if kind == 'cpu' else 'wall'}"
        shown.append(figure(what, ours, peer, theirs, unit="ms", note=note))
    return shown


def table(summary: dict[str, Any]) -> Table:
    names = ("", "wall", "of sbatch", "of ours", "CPU", "of sbatch", "of ours")
    made = table_of(f"milliseconds, medians of {summary['rounds']} interleaved rounds", names)
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
    in_ms = ({name: value * 1000 for name, value in summary["added"][kind].items()} for kind in ("wall", "cpu"))
    wall, cpu = (spread_text(values, 0) for values in in_ms)
    made.add_row("elastic-sbatch adds (least to most)", wall, "", "", cpu)
    return made


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {},
        "sudo benchmarks/submit.py                  # on a mini-slurm of its own",
        "benchmarks/submit.py --here --rounds 30    # on the login node of a cluster, as yourself",
        state=True,
    )
    add = parser.add_argument
    add("--rounds", type=positive, default=15, metavar="N", help="submissions each way (default: 15)")
    add("--here", action="store_true", help="use the Slurm of this machine, as the present user")
    text = (
        "with --here: the folder in which pip has installed torchx (--target); its jobs start unless the queue is full"
    )
    add("--torchx", type=Path, metavar="DIR", help=text)
    add("--raw", action="store_true", help="print the figures as JSON and nothing else")
    return parser.parse_args()


def measure_inside(at: Cluster, rounds: int) -> dict[str, Any]:
    """``measure`` as the user of a mini-slurm. Another job occupies the nodes, so that torchx's jobs, which are not
    held, wait.
    """
    left_out = {}
    options = [f"--rounds={rounds}"]
    try:
        pip_install(at.home / "torchx", "torchx", "torchx")  # with its dependencies in the versions that it needs
        options.append(f"--torchx={at.home / 'torchx'}")
    except BenchmarkError as error:
        left_out["torchx"] = str(error)
    at.reset()
    nodes = f"--nodes={len(at.nodes)}"
    at.run("sbatch", nodes, "--exclusive", "--output=/dev/null", "--wrap=exec sleep 900", cwd=at.home)
    try:
        wait_for(
            "all nodes to be taken", lambda: "R" in at.run("squeue", "--noheader", "--format=%t").split() or None, 60
        )
        output = at.run(sys.executable, str(Path(__file__).resolve()), "--here", "--raw", *options)
    finally:
        at.reset()
    inside: dict[str, Any] = json.loads(output)
    inside["left_out"] |= left_out
    return inside | {"table": lines(inside)}


def main() -> int:
    args = parse_arguments()
    if args.here:
        slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.split()
        report = {"machine": machine() | {"slurm": slurm[-1]}} | measure(args.rounds, args.torchx)
        report |= {"summary": summarize(report["costs"]), "left_out": {} if args.torchx else {"torchx": "not given"}}
    else:
        with cluster(args.state) as at:
            report = measure_inside(at, args.rounds)
    if args.raw:
        print(json.dumps(report))
        return 0
    write_json(args.json, report)
    show(table(report["summary"]))
    modules = report["modules"]
    wrong = [name for name in NEVER if name in modules]
    for name, why in report["left_out"].items():
        print(f"{name} left out: {why}")
    print("imported: " + ", ".join(f"{name} {took:.0f} ms" for name, took in modules.items()))
    print(f"must not be imported: {', '.join(NEVER)}: {'FOUND ' + ', '.join(wrong) if wrong else 'none was'}")
    print(origin(report["machine"], [report["busy_before"]], report["versions"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(run_main(main))
