"""Seconds from a fault to the first step of the new world: elastic_hpc against plain torchrun.

Every run submits examples/train_digits.py to a real Slurm (bin/mini-slurm), waits until it trains on all nodes, breaks
something, and reads from what the training wrote when it went on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _cluster import (
    ROOT,
    BenchmarkError,
    Cluster,
    add_state,
    busy,
    cluster,
    json_lines,
    machine,
    positive,
    wait_for,
)
from rich.console import Console
from rich.table import Table

SCRIPT = str(ROOT / "examples" / "train_digits.py")
CHECKPOINT_EVERY = 20
START_DEADLINE = 240.0
"""Seconds for a job to start training; with four imports of torch on two cores it takes some 20."""

OURS, FT = "elastic", "ft_launcher"
LAUNCHERS = {
    OURS: [],
    "torchrun": ["--template=torchrun"],
    "torchrun-own-store": ["--template=torchrun", "--env=TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"],
    FT: ["--env=GLOO_SOCKET_IFNAME=eth0", "--env=OMP_NUM_THREADS=1"],  # and what install_ft_launcher adds
}
FT_MODULE = "nvidia_resiliency_ext.fault_tolerance.launcher"
AGENTS = {OURS: "elastic_hpc.agent", FT: FT_MODULE}
"""Word of the agents' command line, where it is not torchrun's."""
FT_TEMPLATE = f"""\
#!/bin/bash
{{% include "directives.j2" %}}
{{% include "prepare.j2" %}}
{{% set options = ["{FT_MODULE}", "--ignore-missing-fault-tol-cfg"] %}}
srun {{{{ srun_options|quote_all }}}} \\
  {{{{ (torchrun_command[:3] + options + torchrun_command[4:])|quote_all }}}}
"""

RUNGS = {
    "worker": "SIGKILL to the worker of one node",
    "agent": "SIGKILL to the agent of one node (the others' agents: with their workers, which nothing else ends)",
    "power": "power loss of one node: its links go down, then all of its processes are killed",
    "head": "power loss of the first node, with it the batch script, the leader, torchrun's store",
    "requeue": "ours: the agents of two nodes are killed, that is below MIN; torchrun: scontrol requeue",
    "drain": "the warning before the time limit; ours alone, the others' jobs end at the limit",
}
THROUGH_THE_QUEUE = {"requeue": (OURS, "torchrun"), "drain": (OURS,)}
"""Rungs whose job comes back through the queue, and the launchers between which that makes a difference."""
QUEUE_BOUND = 180.0
"""Seconds that those get in addition: Slurm's own delay of a requeue is 121 s."""
PHASES = ("detection", "round", "running", "start", "total")


@dataclass(frozen=True)
class Run:
    """One fault. Times in seconds."""

    rung: str
    launcher: str
    outcome: str
    """recovered; stuck: the job ran on, no step in ``waited``; ended: the job left the queue after ``waited``."""
    waited: float
    total: float | None = None
    """Fault, through the queue the last step before it, to the end of the new world's first step."""
    detection: float | None = None
    """Fault to the leader's decision to restart or requeue. Only of ours, as ``round`` and ``start``."""
    round: float | None = None
    """Decision to the new round: workers stopped, world formed."""
    running: float | None = None
    """Last step to Slurm's RUNNING, to the second."""
    start: float | None = None
    """Round to the end of its first step: interpreter, imports, process group, checkpoint, one step."""
    rounds: int | None = None
    """New rounds until one made a step; 1 when all went well."""
    world_size: int | None = None
    steps_lost: int | None = None
    """Steps that the new world repeated."""
    busy_before: float = 0.0
    """Share of the machine that others used just before the job was submitted, 0 to 1."""
    load_average: float = 0.0
    """Of one minute, at the fault: our own workers are in it."""
    job: str = ""


class Job:
    """One job of one launcher, in a folder of its own."""

    def __init__(self, at: Cluster, rung: str, launcher: str, folder: Path) -> None:
        self._at = at
        self.launcher = launcher
        self.folder = folder
        at.run("mkdir", "-p", str(folder))
        checkpoint = folder / "digits" / "checkpoint.pt"
        self._steps = checkpoint.with_name("steps.jsonl")
        submitter = str(Path(sys.executable).with_name("elastic-sbatch"))
        least = len(at.nodes) - 1 if rung == "requeue" else 2
        options = ["--parsable", f"--nodes={least}:{len(at.nodes)}", "--nproc-per-node=1", *LAUNCHERS[launcher]]
        if rung == "drain":
            options.append("--grace=10")  # the example does not listen: it trains on for as long
        arguments = [f"--checkpoint={checkpoint}", f"--checkpoint-every={CHECKPOINT_EVERY}", "--epochs=100000"]
        self.id = at.run(submitter, *options, SCRIPT, *arguments, cwd=folder).strip()

    def steps(self) -> list[dict[str, Any]]:
        return json_lines(self._steps)

    def events(self) -> list[dict[str, Any]]:
        return json_lines(self.folder / "elastic-logs" / self.id / "events.jsonl")

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("slurm-*.out")))

    def wait_until_it_trains(self) -> None:
        """Wait for steps of a world of all nodes, a few after a checkpoint: a restart must show in the step numbers."""

        def trains() -> bool | None:
            last = (self.steps() or [{"step": 0}])[-1]
            if last["step"] <= CHECKPOINT_EVERY or not 2 <= last["step"] % CHECKPOINT_EVERY <= CHECKPOINT_EVERY // 2:
                return None
            return bool(last["world_size"] == len(self._at.nodes))

        try:
            right_size = wait_for("the first steps", trains, START_DEADLINE)
        except BenchmarkError as error:
            raise BenchmarkError(f"job {self.id}: {error}\n{self.output()[-2000:]}") from None
        if not right_size:
            raise BenchmarkError(
                f"job {self.id} trains on {self.steps()[-1]['world_size']} of {len(self._at.nodes)} nodes"
            )

    def first_step_of_new_world(self) -> tuple[dict[str, Any], int] | None:
        """The step, and how many steps it and what follows repeat."""
        for before, after in pairwise(self.steps()):
            same = all(before[key] == after[key] for key in ("round", "restart", "world_size"))
            if not same or after["step"] != before["step"] + 1:
                return after, before["step"] + 1 - after["step"]
        return None


def inject(at: Cluster, job: Job, rung: str, node: str) -> float:
    """Break something on ``node``; the answer is when, in seconds since the epoch."""
    if rung in {"power", "head"}:
        return float(at.mini("kill", at.nodes[0] if rung == "head" else node).split()[0])
    if rung == "drain" or (rung == "requeue" and job.launcher != OURS):
        moment = time.time()
        at.run(*(["scontrol", "requeue"] if rung == "requeue" else ["scancel", "--batch", "--signal=USR2"]), job.id)
        return moment
    nodes = [node] if rung != "requeue" else [node, next(n for n in at.nodes[1:] if n != node)]
    launcher = AGENTS.get(job.launcher, "torch.distributed.run")
    agents = [pid for each in nodes for pid in at.pids(each, launcher, SCRIPT)]
    workers = [pid for each in nodes for pid in at.pids(each, SCRIPT, but=[launcher])]
    if len(workers) != len(nodes) or (len(agents) != len(nodes) and job.launcher != FT):
        raise BenchmarkError(f"{node}: expected one agent and one worker, found {len(agents)} and {len(workers)}")
    victims = workers if rung == "worker" else agents if job.launcher == OURS else agents + workers
    moment = time.time()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return moment


def install_ft_launcher(at: Cluster) -> list[str]:
    """NVIDIA's launcher, in a folder of the cluster's user; the answer is how to submit with it."""
    folder, template = at.home / "ft_launcher", at.home / "ft_launcher.sbatch.j2"
    packages = ["nvidia-resiliency-ext", "psutil", "defusedxml", "nvidia-ml-py"]  # without torch, which is there
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", f"--target={folder}"]
    done = subprocess.run([*install, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise BenchmarkError(f"{FT} does not install here: {why}; leave it out: --launchers")
    at.run("env", f"PYTHONPATH={folder}", sys.executable, "-c", f"import {FT_MODULE}")
    template.write_text(FT_TEMPLATE)
    return [f"--template={template}", f"--env=PYTHONPATH={folder}"]


def measure(at: Cluster, rung: str, launcher: str, node: str, bound: float, keep: Path | None) -> Run:
    """One run, from the submission of a job to its end."""
    at.reset()
    others = busy()
    folder = at.home / f"recovery-{rung}-{launcher}"
    bound += QUEUE_BOUND * (rung in THROUGH_THE_QUEUE)
    job = Job(at, rung, launcher, folder)
    try:
        job.wait_until_it_trains()
        load = os.getloadavg()[0]
        moment = inject(at, job, rung, node)
        outcome, found = "stuck", None
        asked = 0.0
        while found is None and (waited := time.time() - moment) < bound:
            found = job.first_step_of_new_world()
            if found is None and waited - asked > 2:
                asked = waited
                if at.job_state(job.id) not in {"RUNNING", "COMPLETING", "PENDING", "REQUEUED"}:
                    outcome = "ended"
                    break
            time.sleep(0.05)
        common = Run(rung, launcher, outcome, waited, busy_before=others, load_average=load, job=job.id)
        return _split(at, common, job, moment, *found) if found else common
    finally:
        at.run("scancel", job.id, check=False)
        if keep:
            to = keep / f"{job.id}-{rung}-{launcher}"
            shutil.copytree(folder, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("secret"))
        at.reset()
        shutil.rmtree(folder, ignore_errors=True)


def _split(at: Cluster, run: Run, job: Job, moment: float, step: dict[str, Any], lost: int) -> Run:
    known: dict[str, Any] = asdict(run) | {
        "outcome": "recovered",
        "total": step["time"] - moment,
        "world_size": step["world_size"],
        "steps_lost": lost,
    }
    queued = run.rung in THROUGH_THE_QUEUE
    if queued:
        last = max(before["time"] for before in job.steps() if before["time"] < step["time"])
        known |= {"total": step["time"] - last, "running": at.started(job.id) - last}
    if run.launcher == OURS:
        after = [event for event in job.events() if event["time"] >= moment]
        decided = next(event for event in after if event["event"] == ("verdict" if queued else "restart"))
        rounds = [event for event in after[after.index(decided) :] if event["event"] == "round"]
        rounds = [event for event in rounds if event["round"] <= step["round"]]
        known |= {
            "detection": decided["time"] - moment,
            "round": rounds[0]["time"] - decided["time"],
            "start": step["time"] - rounds[0]["time"],
            "rounds": len(rounds),
        }
    return Run(**known)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each rung and launcher: counts, median, least and most of each phase, ratio to ours."""
    rows: list[dict[str, Any]] = []
    for rung in RUNGS:
        for launcher in LAUNCHERS:
            mine = [run for run in runs if (run.rung, run.launcher) == (rung, launcher)]
            if not mine:
                continue
            row: dict[str, Any] = {"rung": rung, "launcher": launcher, "runs": len(mine)}
            row |= {word: sum(run.outcome == word for run in mine) for word in ("recovered", "stuck", "ended")}
            row["bound"] = max((run.waited for run in mine if run.outcome == "stuck"), default=None)
            for phase in PHASES:
                values = [value for run in mine if (value := getattr(run, phase)) is not None]
                row[phase] = (
                    {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None
                )
            rows.append(row)
    totals = {row["rung"]: row["total"]["median"] for row in rows if row["launcher"] == OURS and row["total"]}
    for row in rows:
        ours = totals.get(row["rung"])
        row["times_ours"] = row["total"]["median"] / ours if ours and row["total"] and row["launcher"] != OURS else None
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(
        title="seconds from the fault: median (least to most) of the runs that recovered", title_justify="left"
    )
    for name in (
        *("rung", "launcher", "recovered", "detection", "new round"),
        *("RUNNING", "worker start", "total", "of ours"),
    ):
        made.add_column(name, justify="left" if name in {"rung", "launcher"} else "right", no_wrap=name != "total")
    for row in rows:
        made.add_row(row["rung"], row["launcher"], f"{row['recovered']} of {row['runs']}", *_cells(row))
    return made


def _cells(row: dict[str, Any]) -> Iterator[str]:
    for phase in PHASES:
        digits = 2 if phase in {"detection", "round"} else 1
        if spread := row[phase]:
            least, most = f"{spread['min']:.{digits}f}", f"{spread['max']:.{digits}f}"
            text = f"{spread['median']:.{digits}f} ({least} to {most})"
        else:
            text = "-"
        if phase == "total":
            text = "" if text == "-" else text
            if row["stuck"]:
                text += f"\n{row['stuck']} stuck: no step in {row['bound']:.0f} s"
            if row["ended"]:
                text += f"\n{row['ended']} ended the job"
        yield text.strip()
    yield f"x {row['times_ours']:.1f}" if row["times_ours"] else ""


def parse_arguments() -> argparse.Namespace:
    lines = [f"  {name:<10}{text}" for name, text in RUNGS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rungs:\n" + "\n".join(lines) + "\n\nexamples:\n"
        "  sudo benchmarks/recovery.py                                    # all, an hour and more\n"
        "  sudo benchmarks/recovery.py --launchers elastic --runs 5       # ours alone\n"
        "  sudo benchmarks/recovery.py --rungs power --bound 120 --json power.json",
    )
    add = parser.add_argument
    add("--runs", type=positive, default=3, metavar="N", help="of each rung and launcher (default: 3)")
    add("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), help="default: all")
    add("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="default: all")
    add("--node", default="n3", help="where it happens, but for head (default: n3)")
    add(
        "--bound",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="how long to wait for a step before a run counts as stuck, through the queue 180 more (default: 60)",
    )
    add("--json", type=Path, metavar="FILE", help="write all runs, the summary and where it was measured")
    add("--keep", type=Path, metavar="DIR", help="copy each job's logs and steps there")
    add_state(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    runs: list[Run] = []
    report: dict[str, Any] = {}
    if args.json and not args.json.parent.is_dir():
        print(f"recovery.py: --json {str(args.json)!r}: expected a file in a folder that exists", file=sys.stderr)
        return 2
    try:
        with cluster(args.state) as at:
            at.expect_node(args.node)
            report = {"machine": machine() | {"slurm": at.slurm_version()}, "bound": args.bound}
            if FT in args.launchers:
                LAUNCHERS[FT] += install_ft_launcher(at)
            pairs = [(rung, who) for rung in args.rungs for who in args.launchers]
            plan = [(rung, who) for rung, who in pairs if who in THROUGH_THE_QUEUE.get(rung, LAUNCHERS)] * args.runs
            for number, (rung, launcher) in enumerate(plan, 1):
                run = measure(at, rung, launcher, args.node, args.bound, args.keep)
                runs.append(run)
                parts = [f"{name} {getattr(run, name):.2f}" for name in PHASES if getattr(run, name) is not None]
                told = ", ".join(parts) or f"{run.outcome} after {run.waited:.0f} s"
                world = f", world of {run.world_size}, {run.steps_lost} steps repeated" if run.world_size else ""
                print(
                    f"{number}/{len(plan)} {rung} {launcher}: {told}{world}; "
                    f"others {run.busy_before:.0%}, load {run.load_average:.1f}",
                    flush=True,
                )
                if args.json:
                    report |= {"summary": summarize(runs), "runs": [asdict(one) for one in runs]}
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    except (BenchmarkError, OSError) as error:
        print(f"recovery.py: {error}", file=sys.stderr)
        if not runs:
            return 1
    except KeyboardInterrupt:
        print(f"recovery.py: stopped after {len(runs)} runs", file=sys.stderr)
    console.print(table(summarize(runs)))
    where = report["machine"]
    print(
        f"{where['date']}: torch {where['torch']}, Slurm {where['slurm']}, Python {where['python']}, "
        f"{where['cores']} cores; others used "
        f"{min(r.busy_before for r in runs):.0%} to {max(r.busy_before for r in runs):.0%} of them before the runs, "
        f"load at the fault {min(r.load_average for r in runs):.1f} to {max(r.load_average for r in runs):.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
