"""The cost of looking: ``status``, ``why`` and a page of ``serve`` of a job of a month, ``status`` of 2,000 old jobs,
and ``elastic-hpc logs``.

The records are made here, with a progress event every ten seconds, as the leader writes them; only the commands' own
code runs. Needs no Slurm.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from _report import BenchmarkError, busy, machine, origin, parser_with, positive, run_main, show, table_of, write_json

from elastic_hpc.job.handle import why
from elastic_hpc.job.look import Jobs
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.live import job_page

DAY = 86400
MONTH_S, LOOK_S, LINES_PER_S = 2.0, 0.05, 100_000
"""Targets: seconds for the first look at a month, seconds for each further look, lines per second of ``logs``."""
_FURTHER = ("further_s", "why_s", "page_s")
BEGAN = 1_790_000_000.0
NODES = [f"n{number}" for number in range(8)]


def events(days: float, rounds_a_day: float) -> Iterator[dict[str, Any]]:
    """The events of a job of 8 nodes that ran ``days``, with a restart ``rounds_a_day`` times a day."""
    when, step, round, restarts = BEGAN, 0, 0, 0
    yield {"time": when, "event": "start", "run": 0, "job": "1", "granted": 8, "min_nodes": 4, "max_nodes": 8}
    yield {"time": when, "event": "allocation", "run": 0, "submitted": when - 9, "started": when - 1, "ends": None}
    while when < BEGAN + days * DAY:
        round += 1
        formed = {"round": round, "nodes": NODES, "world_size": 8, "restarts": restarts, "leader": "n0"}
        yield {"time": when, "event": "round", **formed}
        first, first_at = step + 1, when + 5
        until = min(BEGAN + days * DAY, when + DAY / rounds_a_day if rounds_a_day else float("inf"))
        while when < until:
            when, step = when + 10, step + 97
            progress = {"step": step, "step_at": when - 0.4, "first": first, "first_at": first_at, "loss": 2.5 / step}
            yield {"time": when, "event": "progress", "round": round, **progress}
        restarts += 1
        failed = {"node": "n3", "kind": "exception", "message": "ValueError", "rank": 3, "traceback": "", "first": True}
        yield {"time": when, "event": "failure", "round": round, **failed}
        yield {"time": when, "event": "restart", "round": round, "reason": "rank 3 on n3", "restarts": restarts}


def write_record(folder: Path, days: float, rounds_a_day: float) -> RunDir:
    folder.mkdir(parents=True)
    with open(folder / "events.n0.jsonl", "w") as file:
        file.writelines(json.dumps(event) + "\n" for event in events(days, rounds_a_day))
    (folder / "spec.json").write_text(json.dumps({"job": folder.name, "script": "train.py"}))
    verdict = {"run": 0, "outcome": "finished", "cause": "", "reason": "all workers finished", "failure": None}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    return RunDir(folder)


def cpu() -> float:
    return time.process_time()


def look_at(rundir: RunDir) -> dict[str, float]:
    """The first look and further looks, each after one more event; in a process of its own."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, cpu()
    jobs = Jobs([rundir])
    ((view, *_),) = jobs.look()
    first = cpu() - begin
    further, why_s, page_s = [], [], []
    for number in range(20):
        when = BEGAN + 40 * DAY + 10 * number
        event = {"step": (view.step or 0) + number, "step_at": when, "first": 1, "first_at": when, "loss": 1.0}
        with open(rundir.path / "events.n0.jsonl", "a") as file:
            file.write(json.dumps({"time": when, "event": "progress", "round": view.round, **event}) + "\n")
        begin = cpu()
        (look,) = jobs.look()
        further.append(cpu() - begin)
        begin = cpu()
        text = why(look)
        why_s.append(cpu() - begin)
        job_page(look.view, look.story, when, key="1", why=text, log=[], said="", nonce="1")
        page_s.append(further[-1] + cpu() - begin)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "first_s": first,
        "further_s": max(further),
        "why_s": median(why_s),
        "page_s": median(page_s),
        "added_mib": (after - before) / 1024,
    }


def status_of_many(folder: Path, count: int) -> float:
    """CPU seconds of ``elastic-hpc status`` where ``count`` jobs ended long ago."""
    state = folder / "state" / "elastic_hpc"
    state.mkdir(parents=True)
    runs = [write_record(folder / "jobs" / str(number), 0.01, 0) for number in range(1, count + 1)]
    for rundir in runs:
        os.utime(rundir.path / "verdict.json", (BEGAN, BEGAN))
    (state / "jobs").write_text("".join(f"{rundir.path}\n" for rundir in runs))
    return seconds_of("status", folder=folder)


def logs_of(folder: Path, lines: int) -> float:
    """CPU seconds of ``elastic-hpc logs`` for ``lines`` lines, not on a terminal."""
    rundir = write_record(folder / "logged", 0.01, 0)
    of_round = rundir.path / "logs" / "0.1"
    of_round.mkdir(parents=True)
    with open(of_round / "n0.rank0-0.log", "w") as file:
        file.writelines(
            f"2026-11-28T21:{number // 60000 % 60:02}:{number // 1000 % 60:02}.{number % 1000:03}Z rank0 out F step "
            f"{number}, loss 0.4242\n"
            for number in range(lines)
        )
    return seconds_of("logs", str(rundir.path), folder=folder)


def seconds_of(*arguments: str, folder: Path) -> float:
    """CPU seconds of ``elastic-hpc`` with ``arguments``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environ = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
    command = [sys.executable, "-m", "elastic_hpc", *arguments]
    ran = subprocess.run(
        command, env=environ, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if ran.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit code {ran.returncode}: {ran.stderr.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_its_own_process(rundir: RunDir) -> dict[str, float]:
    command = [sys.executable, __file__, "--look-at", str(rundir.path)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def measure(jobs: int, lines: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = {
            "a week in one round": (7, 0.0),
            "a month in one round": (30, 0.0),
            "a month, 10 restarts a day": (30, 10.0),
        }
        looks = {}
        for number, (title, shape) in enumerate(records.items()):
            looks[title] = in_its_own_process(write_record(folder / f"record-{number}", *shape))
        start = seconds_of("status", "--all", folder=folder)
        many = status_of_many(folder, jobs)
        printed = logs_of(folder, lines) - start
        return {
            "looks": looks,
            "start_s": start,
            "status_of_many_s": many,
            "jobs": jobs,
            "lines_per_s": lines / printed,
        }


def main() -> int:
    parser = parser_with(__doc__, {}, "benchmarks/view.py", "benchmarks/view.py --jobs 500 --lines 100000")
    parser.add_argument("--jobs", type=positive, default=2000, metavar="N", help="jobs that ended long ago")
    parser.add_argument("--lines", type=positive, default=1_000_000, metavar="N", help="lines of output")
    parser.add_argument("--look-at", type=Path, metavar="DIR", help="of this run directory alone, as JSON")
    args = parser.parse_args()
    if args.look_at:
        print(json.dumps(look_at(RunDir(args.look_at))))
        return 0
    others = busy()
    report = {"machine": machine()} | measure(args.jobs, args.lines)
    write_json(args.json, report)
    columns = ("record", "first look, s of CPU", "a further look, ms", "why, ms", "a page of serve, ms", "memory, MiB")
    made = table_of("Looking at a job", columns, ("record",))
    for title, look in report["looks"].items():
        further = (f"{1000 * look[name]:.1f}" for name in _FURTHER)
        made.add_row(title, f"{look['first_s']:.2f}", *further, f"{look['added_mib']:.0f}")
    show(made)
    print(f"status of {report['jobs']} old jobs: {report['status_of_many_s']:.2f} s, of none {report['start_s']:.2f} s")
    print(f"logs: {report['lines_per_s']:,.0f} lines/s")
    print(origin(report["machine"], [others]))
    slow = [
        title
        for title, look in report["looks"].items()
        if look["first_s"] > MONTH_S or max(look[name] for name in _FURTHER) > LOOK_S
    ]
    if report["lines_per_s"] < LINES_PER_S:
        slow.append("logs")
    print("too slow: " + ", ".join(slow) if slow else "all within what is to be reached")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(run_main(main))
