"""Seconds from a fault to the first step of the new world: elastic_hpc against plain torchrun.

Every run submits examples/train_digits.py to a real Slurm (bin/mini-slurm), waits until it trains on all nodes, breaks
something, and reads from what the training wrote when it went on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _cluster import (
    FT,
    FT_MODULE,
    ROOT,
    BenchmarkError,
    Cluster,
    Job,
    Run,
    add_output,
    add_state,
    busy,
    can_write,
    cluster,
    cpu_seconds,
    figure,
    install_ft_launcher,
    installed,
    kept,
    machine,
    origin,
    parser_with,
    positive,
    spread,
    spread_text,
    wait_for,
)
from rich.console import Console
from rich.table import Table

SCRIPT = str(ROOT / "examples" / "train_digits.py")
CHECKPOINT_EVERY = 20
START_DEADLINE = 240.0
"""Seconds for a job to start training; with four imports of torch on two cores it takes some 20."""

STANDBY_IDLE, STANDBY_DEADLINE = 4.0, 60.0
"""Seconds without work after which a standby is taken for ready, as it rests between its imports, and for how long
that is waited for: a job has trained for hours when a fault comes.
"""

OURS, COLD, FULL = "elastic", "elastic-cold", "elastic-preload"
OF_US = {
    OURS: [],
    COLD: ["--preload=off"],
    FULL: ["--preload=torch,torch._dynamo,sklearn.datasets"],  # all that the example comes to import
}
LAUNCHERS = {
    **OF_US,
    "torchrun": ["--template=torchrun"],
    "torchrun-own-store": ["--template=torchrun", "--env=TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"],
    FT: [],  # and what install_ft_launcher adds
}
AGENTS = {**dict.fromkeys(OF_US, "elastic_hpc.agent"), FT: FT_MODULE}
"""Word of the agents' command line, where it is not torchrun's."""

RUNGS = {
    "worker": "SIGKILL to the worker of one node",
    "agent": "SIGKILL to the agent of one node (the others' agents: with their workers, which nothing else ends)",
    "power": "power loss of one node: its links go down, then all of its processes are killed",
    "head": "power loss of the first node, with it the batch script, the leader, torchrun's store",
    "requeue": "ours: the agents of two nodes are frozen, that is below MIN; torchrun: scontrol requeue",
    "drain": "the warning before the time limit; ours alone, the others' jobs end at the limit",
}
TITLES = {
    "worker": "a worker is killed",
    "agent": "an agent is killed",
    "power": "power loss of a node",
    "head": "power loss of the head",
    "requeue": "fewer than MIN nodes: back through the queue",
    "drain": "warning before the time limit",
}
THROUGH_THE_QUEUE = {"requeue": (*OF_US, "torchrun"), "drain": tuple(OF_US)}
"""Rungs whose job comes back through the queue, and the launchers between which that makes a difference."""
QUEUE_BOUND = 180.0
"""Seconds that those get in addition: Slurm's own delay of a requeue is 121 s."""
PHASES = ("detection", "round", "running", "start", "total")


@dataclass(frozen=True, kw_only=True)
class Fault(Run):
    """One fault. ``outcome`` is ``recovered`` if all went well, ``total`` from the fault, through the queue from the
    last step before it, to the end of the new world's first step.
    """

    detection: float | None = None
    """Fault to the leader's decision to restart or requeue. Only of ours."""
    running: float | None = None
    """Last step to Slurm's RUNNING, to the second."""
    rounds: int | None = None
    """New rounds until one made a step; 1 when all went well."""
    world_size: int | None = None
    steps_lost: int | None = None
    """Steps that the new world repeated."""
    warm: int | None = None
    """Workers of the new world that had been standbys."""


def is_standby(line: Sequence[str]) -> bool:
    """``line``: the command line of a process; a standby has its script's only once it is a worker."""
    return len(line) > 2 and line[2].startswith("/dev/fd/")


class DigitsJob(Job):
    """examples/train_digits.py by one of the launchers."""

    def __init__(self, at: Cluster, rung: str, launcher: str) -> None:
        self.launcher = launcher
        folder = at.home / f"{rung}-{launcher}"
        checkpoint = folder / "digits" / "checkpoint.pt"
        least = len(at.nodes) - 1 if rung == "requeue" else 2
        options = [f"--nodes={least}:{len(at.nodes)}", "--nproc-per-node=1", *LAUNCHERS[launcher]]
        if rung == "drain":
            options.append("--grace=10")  # the example does not listen: it trains on for as long
        arguments = [f"--checkpoint={checkpoint}", f"--checkpoint-every={CHECKPOINT_EVERY}", "--epochs=100000"]
        super().__init__(at, folder, checkpoint.with_name("steps.jsonl"), *options, SCRIPT, *arguments)

    def wait_until_it_trains(self) -> None:
        """Wait for steps of a world of all nodes, a few after a checkpoint: a restart must show in the step numbers."""

        def trains() -> bool | None:
            last = (self.steps() or [{"step": 0}])[-1]
            if last["step"] <= CHECKPOINT_EVERY or not 2 <= last["step"] % CHECKPOINT_EVERY <= CHECKPOINT_EVERY // 2:
                return None
            return bool(last["world_size"] == len(self.at.nodes))

        self.wait_for_steps(lambda: self.steps() or None, START_DEADLINE)
        if self.launcher in {OURS, FULL}:
            self._wait_for_standbys()
        if not self.wait_for_steps(trains, START_DEADLINE):
            raise BenchmarkError(
                f"job {self.id} trains on {self.steps()[-1]['world_size']} of {len(self.at.nodes)} nodes"
            )

    def _wait_for_standbys(self) -> None:
        """Until those of all nodes have done nothing for a while. Where that takes too long, the next round tells how
        many there were.
        """
        idle_since = time.monotonic()
        before: dict[int, float] = {}

        def idle() -> bool | None:
            nonlocal idle_since, before
            used: dict[int, float] = {}
            for node in self.at.nodes:
                found = [pid for pid, line in self.at.processes(node).items() if is_standby(line)]
                used |= {pid: cpu_seconds(pid) for pid in found}
            if used != before or len(used) != len(self.at.nodes):
                idle_since, before = time.monotonic(), used
            return time.monotonic() - idle_since > STANDBY_IDLE or None

        with contextlib.suppress(BenchmarkError):
            wait_for("the standbys", idle, STANDBY_DEADLINE, every=0.5)

    def warm(self, round: int) -> int | None:
        """How many workers of ``round`` had been standbys; None if that is not told within seconds."""

        def started() -> int | None:
            told = [event for event in self.events() if event["event"] == "started" and event["round"] == round]
            return int(told[-1]["warm"]) if told else None

        with contextlib.suppress(BenchmarkError):
            return wait_for("how they were started", started, 5)
        return None

    def first_step_of_new_world(self) -> tuple[dict[str, Any], int] | None:
        """The step, and how many steps it and what follows repeat."""
        for before, after in pairwise(self.steps()):
            same = all(before[key] == after[key] for key in ("round", "restart", "world_size"))
            if not same or after["step"] != before["step"] + 1:
                return after, before["step"] + 1 - after["step"]
        return None


def inject(at: Cluster, job: DigitsJob, rung: str, node: str) -> float:
    """Break something on ``node``; the answer is when, in seconds since the epoch."""
    if rung in {"power", "head"}:
        return float(at.mini("kill", at.nodes[0] if rung == "head" else node).split()[0])
    if rung == "drain" or (rung == "requeue" and job.launcher not in OF_US):
        moment = time.time()
        at.run(*(["scontrol", "requeue"] if rung == "requeue" else ["scancel", "--batch", "--signal=USR2"]), job.id)
        return moment
    nodes = [node] if rung != "requeue" else [node, next(n for n in at.nodes[1:] if n != node)]
    launcher = AGENTS.get(job.launcher, "torch.distributed.run")
    agents = [pid for each in nodes for pid in at.pids(each, launcher, SCRIPT)]
    workers = [pid for each in nodes for pid in at.pids(each, SCRIPT, but=[launcher])]
    if len(workers) != len(nodes) or (len(agents) != len(nodes) and job.launcher != FT):
        raise BenchmarkError(f"{node}: expected one agent and one worker, found {len(agents)} and {len(workers)}")
    victims = workers if rung == "worker" else agents if job.launcher in OF_US else agents + workers
    moment = time.time()
    for pid in victims:
        os.kill(pid, signal.SIGSTOP if rung == "requeue" else signal.SIGKILL)  # one that is killed is started anew
    return moment


def measure(at: Cluster, rung: str, launcher: str, node: str, bound: float, keep: Path | None) -> Fault:
    """One run, from the submission of a job to its end."""
    at.reset()
    others = busy()
    bound += QUEUE_BOUND * (rung in THROUGH_THE_QUEUE)
    job = DigitsJob(at, rung, launcher)
    try:
        job.wait_until_it_trains()
        moment = inject(at, job, rung, node)
        found, said = job.watch(job.first_step_of_new_world, moment, bound)
        common = Fault(rung=rung, launcher=launcher, busy_before=others, **said)
        return _split(at, common, job, moment, *found) if found else common
    finally:
        job.clear(keep)


def _split(at: Cluster, run: Fault, job: DigitsJob, moment: float, step: dict[str, Any], lost: int) -> Fault:
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
    if run.launcher in OF_US:
        after = [event for event in job.events() if event["time"] >= moment]
        decided = next(event for event in after if event["event"] == ("verdict" if queued else "restart"))
        rounds = [event for event in after[after.index(decided) :] if event["event"] == "round"]
        rounds = [event for event in rounds if event["round"] <= step["round"]]
        known |= {
            "detection": decided["time"] - moment,
            "round": rounds[0]["time"] - decided["time"],
            "start": step["time"] - rounds[0]["time"],
            "rounds": len(rounds),
            "warm": job.warm(rounds[-1]["round"]),
        }
    return Fault(**known)


def summarize(runs: Sequence[Fault]) -> list[dict[str, Any]]:
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
                row[phase] = spread(getattr(run, phase) for run in mine)
            rows.append(row)
    totals = {row["rung"]: row["total"]["median"] for row in rows if row["launcher"] == OURS and row["total"]}
    for row in rows:
        ours = totals.get(row["rung"])
        row["times_ours"] = row["total"]["median"] / ours if ours and row["total"] and row["launcher"] != OURS else None
    return rows


def report(runs: Sequence[Fault], where: dict[str, Any]) -> dict[str, Any]:
    """All runs, what they come to, and where they were measured (``where`` of ``where_it_runs``)."""
    rows = summarize(runs)
    return {"machine": where, "summary": rows, "runs": list(map(asdict, runs)), "table": lines(rows, where)}


def where_it_runs(at: Cluster) -> dict[str, Any]:
    ft = installed(at.home / FT, "nvidia-resiliency-ext")
    return machine() | {"slurm": at.slurm_version()} | ({FT: ft} if ft else {})


def lines(rows: Sequence[dict[str, Any]], where: dict[str, Any]) -> list[dict[str, Any]]:
    """For run.py's table: each peer against ours."""
    ours = {row["rung"]: row["total"]["median"] for row in rows if row["launcher"] == OURS and row["total"]}
    shown = []
    for row in rows:
        if row["launcher"] == OURS and any(other["rung"] == row["rung"] for other in rows if other is not row):
            continue
        name = f"recovery, {TITLES[row['rung']]}"
        stuck = f"stuck: no step in {row['bound']:.0f} s" if row["stuck"] else "ended the job" if row["ended"] else ""
        theirs = row["total"]["median"] if row["total"] else None
        known = {name: f"ours, {' '.join(options)}" for name, options in OF_US.items()}
        known |= {FT: f"{FT} {where.get(FT, '')}"}
        peer = known.get(row["launcher"], f"{row['launcher'].replace('-own-store', ', own store')} {where['torch']}")
        if row["launcher"] == OURS:
            shown.append(figure(name, theirs, "-", None, note=stuck))
        else:
            shown.append(figure(name, ours.get(row["rung"]), peer, theirs, note=stuck))
    return shown


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
        text = spread_text(row[phase], digits)
        if phase == "total":
            text = "" if text == "-" else text
            if row["stuck"]:
                text += f"\n{row['stuck']} stuck: no step in {row['bound']:.0f} s"
            if row["ended"]:
                text += f"\n{row['ended']} ended the job"
        yield text.strip()
    yield f"x {row['times_ours']:.1f}" if row["times_ours"] else ""


def told(run: Fault) -> str:
    """In one line."""
    parts = [f"{name} {getattr(run, name):.2f}" for name in PHASES if getattr(run, name) is not None]
    said = ", ".join(parts) or f"{run.outcome} after {run.waited:.0f} s"
    world = f", world of {run.world_size}, {run.steps_lost} steps repeated" if run.world_size else ""
    world += "" if run.warm is None else f", {run.warm} standbys"
    return f"{run.rung} {run.launcher}: {said}{world}; others {run.busy_before:.0%}, load {run.load_average:.1f}"


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"rungs:": "", **RUNGS},
        "recovery.py                                    # all, an hour and more",
        "recovery.py --launchers elastic --runs 5       # ours alone",
        "recovery.py --rungs power --bound 120 --json power.json",
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
    add_output(parser)
    add_state(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    runs: list[Fault] = []
    where: dict[str, Any] = {}
    if not can_write(args.json):
        return 2
    with kept(runs), cluster(args.state) as at:
        at.expect_node(args.node)
        if FT in args.launchers:
            LAUNCHERS[FT] += install_ft_launcher(at)
        where = where_it_runs(at)
        pairs = [(rung, who) for rung in args.rungs for who in args.launchers]
        plan = [(rung, who) for rung, who in pairs if who in THROUGH_THE_QUEUE.get(rung, LAUNCHERS)] * args.runs
        for number, (rung, launcher) in enumerate(plan, 1):
            run = measure(at, rung, launcher, args.node, args.bound, args.keep)
            runs.append(run)
            print(f"{number}/{len(plan)} {told(run)}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report(runs, where), indent=1) + "\n")
    if not runs:
        return 1
    console.print(table(summarize(runs)))
    print(origin(where, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
