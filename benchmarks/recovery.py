"""Seconds from a fault to the first step of the new world: elastic_hpc against plain torchrun.

Every run submits examples/train_digits.py to a real Slurm (bin/mini-slurm), waits until it trains on all nodes, breaks
something, and reads from the training's output when it continued. Training in place runs examples/live_digits.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _cluster import Cluster, cluster, wait_for
from _jobs import Job, Run, summary
from _launchers import (
    AGENT,
    FT,
    FT_MODULE,
    LIVE,
    OURS,
    OWN_STORE,
    OWN_STORE_OPTION,
    TORCHRUN,
    TORCHRUN_MODULE,
    install_ft_launcher,
    installed,
    peer_name,
    torch_214,
)
from _processes import cpu_seconds, is_standby
from _report import (
    ROOT,
    BenchmarkError,
    busy,
    figure,
    kept,
    machine,
    origin,
    parser_with,
    positive,
    show,
    spread_text,
    table_of,
    write_json,
)
from rich.table import Table

SCRIPT, LIVE_SCRIPT = (str(ROOT / "examples" / name) for name in ("train_digits.py", "live_digits.py"))
CHECKPOINT_EVERY = 20
START_DEADLINE = 240.0
"""Seconds for a job to start training; with four imports of torch on two cores, that takes about 20."""

STANDBY_IDLE, STANDBY_DEADLINE = 4.0, 60.0
"""Seconds without work after which a standby counts as ready (it also pauses between its imports), and for how long
recovery.py waits for that: in practice a job has trained for hours when a fault comes.
"""

COLD, FULL = "elastic-cold", "elastic-preload"
OF_US = {
    OURS: [],
    COLD: ["--preload=off"],
    FULL: ["--preload=torch,torch._dynamo,sklearn.datasets"],  # all that the example imports in the end
    LIVE: [],  # and the interpreter that torch_214 finds
}
LAUNCHERS = {
    **OF_US,
    TORCHRUN: ["--template=torchrun"],
    OWN_STORE: ["--template=torchrun", OWN_STORE_OPTION],
    FT: [],  # and what install_ft_launcher adds
}
AGENTS = {**dict.fromkeys(OF_US, AGENT), FT: FT_MODULE}
"""A word of the agents' command line, where they are not torchrun's."""

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
THROUGH_THE_QUEUE = {"requeue": (*OF_US, TORCHRUN), "drain": tuple(OF_US)}
"""Rungs whose job is requeued, and the launchers that differ in that."""
QUEUE_BOUND = 180.0
"""Additional seconds for these rungs: Slurm itself delays a requeue by 121 s."""
PHASES = ("detection", "round", "running", "start", "total")


@dataclass(frozen=True, kw_only=True)
class Fault(Run):
    """One fault. ``outcome`` is ``recovered`` if all went well, ``total``: from the fault, or at a requeue from
    the last step before it, to the end of the new world's first step.
    """

    detection: float | None = None
    """From the fault to the leader's decision to restart or requeue. Known only for our launchers."""
    running: float | None = None
    """From the last step to Slurm's RUNNING, to the second."""
    rounds: int | None = None
    """Number of new rounds until one did a step; 1 if all went well."""
    world_size: int | None = None
    steps_lost: int | None = None
    """Steps that the new world repeated."""
    warm: int | None = None
    """Number of workers of the new world that had been standbys."""
    kept: int | None = None
    """Worker processes from before the fault that are alive when the new world has done its first step."""


class DigitsJob(Job):
    """examples/train_digits.py by one of the launchers."""

    def __init__(self, at: Cluster, rung: str, launcher: str) -> None:
        self.launcher = launcher
        self.script = LIVE_SCRIPT if launcher == LIVE else SCRIPT
        folder = at.home / f"{rung}-{launcher}"
        data = folder / "digits"
        least = len(at.nodes) - 1 if rung == "requeue" else 2
        options = [f"--nodes={least}:{len(at.nodes)}", "--nproc-per-node=1", *LAUNCHERS[launcher]]
        if rung == "drain":
            options.append("--grace=10")  # the example does not listen for a drain: it would train for that long
        where = f"--folder={data}" if launcher == LIVE else f"--checkpoint={data / 'checkpoint.pt'}"
        arguments = [where, f"--checkpoint-every={CHECKPOINT_EVERY}", "--epochs=100000"]
        super().__init__(at, folder, data / "steps.jsonl", *options, self.script, *arguments)

    def agents(self, node: str) -> list[int]:
        return self.at.pids(node, AGENTS.get(self.launcher, TORCHRUN_MODULE), self.script)

    def workers(self, node: str) -> list[int]:
        return self.at.pids(node, self.script, but=[AGENTS.get(self.launcher, TORCHRUN_MODULE)])

    def wait_until_it_trains(self) -> None:
        """Wait for steps of a world of all nodes, a few after a checkpoint, so that a restart shows in the step
        numbers.
        """

        def trains() -> bool | None:
            last = (self.steps() or [{"step": 0}])[-1]
            if last["step"] <= CHECKPOINT_EVERY or not 2 <= last["step"] % CHECKPOINT_EVERY <= CHECKPOINT_EVERY // 2:
                return None
            return bool(last["world_size"] == len(self.at.nodes))

        self.wait_for_steps(lambda: self.steps() or None, START_DEADLINE)
        if self.launcher in {OURS, FULL, LIVE}:
            self._wait_for_standbys()
        if not self.wait_for_steps(trains, START_DEADLINE):
            raise BenchmarkError(
                f"job {self.id} trains on {self.steps()[-1]['world_size']} of {len(self.at.nodes)} nodes"
            )

    def _wait_for_standbys(self) -> None:
        """Wait until the standbys of all nodes have been idle for a while. If that takes too long, the next round
        records how many standbys there were.
        """
        idle_since = time.monotonic()
        before: dict[int, float] = {}

        def idle() -> bool | None:
            nonlocal idle_since, before
            used: dict[int, float] = {}
            for node in self.at.nodes:
                used |= {pid: cpu_seconds(pid) for pid, line in self.at.processes(node).items() if is_standby(line)}
            if used != before or len(used) != len(self.at.nodes):
                idle_since, before = time.monotonic(), used
            return time.monotonic() - idle_since > STANDBY_IDLE or None

        with contextlib.suppress(BenchmarkError):
            wait_for("the standbys", idle, STANDBY_DEADLINE, every=0.5)

    def warm(self, round: int) -> int | None:
        """Number of workers of ``round`` that had been standbys; None if no event records it within seconds."""

        def started() -> int | None:
            events = [event for event in self.events() if event["event"] == "started" and event["round"] == round]
            return int(events[-1]["warm"]) if events else None

        with contextlib.suppress(BenchmarkError):
            return wait_for("how they were started", started, 5)
        return None

    def first_step_of_new_world(self) -> tuple[dict[str, Any], int] | None:
        """The step, and how many steps are repeated from there on."""
        for before, after in pairwise(self.steps()):
            same = all(before[key] == after[key] for key in ("round", "restart", "world_size"))
            if not same or after["step"] != before["step"] + 1:
                return after, before["step"] + 1 - after["step"]
        return None


def inject(at: Cluster, job: DigitsJob, rung: str) -> float:
    """Inject the fault. Returns its time in seconds since the epoch."""
    head, other, node, *_ = at.nodes
    if rung in {"power", "head"}:
        return float(at.mini("kill", head if rung == "head" else node).split()[0])
    if rung == "drain" or (rung == "requeue" and job.launcher not in OF_US):
        moment = time.time()
        at.run(*(["scontrol", "requeue"] if rung == "requeue" else ["scancel", "--batch", "--signal=URG"]), job.id)
        return moment
    nodes = [node, other] if rung == "requeue" else [node]
    agents = [pid for name in nodes for pid in job.agents(name)]
    workers = [pid for name in nodes for pid in job.workers(name)]
    if len(workers) != len(nodes) or (len(agents) != len(nodes) and job.launcher != FT):
        raise BenchmarkError(f"{node}: expected one agent and one worker, found {len(agents)} and {len(workers)}")
    victims = workers if rung == "worker" else agents if job.launcher in OF_US else agents + workers
    moment = time.time()
    for pid in victims:
        os.kill(pid, signal.SIGSTOP if rung == "requeue" else signal.SIGKILL)  # a killed agent would be restarted
    return moment


def measure(at: Cluster, rung: str, launcher: str, bound: float, keep: Path | None) -> Fault:
    """One run, from the submission of a job to its end."""
    at.reset()
    others = busy()
    bound += QUEUE_BOUND * (rung in THROUGH_THE_QUEUE)
    job = DigitsJob(at, rung, launcher)
    try:
        job.wait_until_it_trains()
        before = {pid for node in at.nodes for pid in job.workers(node)}
        moment = inject(at, job, rung)
        new_world, run = job.watch(job.first_step_of_new_world, moment, bound)
        after = {pid for node in at.nodes for pid in job.workers(node)}
        fault = Fault(rung=rung, launcher=launcher, busy_before=others, kept=len(before & after), **run)
        return _split(at, fault, job, moment, *new_world) if new_world else fault
    finally:
        job.clear(keep)


def _split(at: Cluster, run: Fault, job: DigitsJob, moment: float, step: dict[str, Any], lost: int) -> Fault:
    fields: dict[str, Any] = asdict(run) | {
        "outcome": "recovered",
        "total": step["time"] - moment,
        "world_size": step["world_size"],
        "steps_lost": lost,
    }
    queued = run.rung in THROUGH_THE_QUEUE
    if queued:
        last = max(before["time"] for before in job.steps() if before["time"] < step["time"])
        fields |= {"total": step["time"] - last, "running": at.started(job.id) - last}
    if run.launcher in OF_US:
        after = [event for event in job.events() if event["time"] >= moment]
        decided = next(event for event in after if event["event"] == ("verdict" if queued else "restart"))
        rounds = [event for event in after[after.index(decided) :] if event["event"] == "round"]
        rounds = [event for event in rounds if event["round"] <= step["round"]]
        fields |= {
            "detection": decided["time"] - moment,
            "round": rounds[0]["time"] - decided["time"],
            "start": step["time"] - rounds[0]["time"],
            "rounds": len(rounds),
            "warm": job.warm(rounds[-1]["round"]),
        }
    return Fault(**fields)


def summarize(runs: Sequence[Fault]) -> list[dict[str, Any]]:
    """One row for each rung and launcher: counts, median, minimum and maximum of each phase, ratio to ours."""
    rows = summary(runs, RUNGS, list(LAUNCHERS), ("recovered", "stuck", "ended"), (*PHASES, "steps_lost", "kept"))
    totals = {row["rung"]: row["total"]["median"] for row in rows if row["launcher"] == OURS and row["total"]}
    for row in rows:
        mine = [run for run in runs if (run.rung, run.launcher) == (row["rung"], row["launcher"])]
        row["bound"] = max((run.waited for run in mine if run.outcome == "stuck"), default=None)
        ours = totals.get(row["rung"])
        row["times_ours"] = row["total"]["median"] / ours if ours and row["total"] and row["launcher"] != OURS else None
    return rows


def report(runs: Sequence[Fault], where: dict[str, Any]) -> dict[str, Any]:
    """All runs, their summary, and the machine (``where`` of ``where_it_runs``)."""
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
        what = f"recovery, {TITLES[row['rung']]}"
        stuck = f"stuck: no step in {row['bound']:.0f} s" if row["stuck"] else "ended the job" if row["ended"] else ""
        theirs = row["total"]["median"] if row["total"] else None
        names = {name: f"ours, {' '.join(options)}" for name, options in OF_US.items()}
        names |= {LIVE: "ours, in place", FT: f"{FT} {where.get(FT, '')}"}
        peer = names.get(row["launcher"], peer_name(row["launcher"], where["torch"]))
        if row["launcher"] == OURS:
            shown.append(figure(what, theirs, "-", None, note=stuck))
        else:
            shown.append(figure(what, ours.get(row["rung"]), peer, theirs, note=stuck))
    return shown


def table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("rung", "launcher", "recovered", "detection", "new round", "RUNNING", "worker start", "total", "of ours")
    names += ("repeated", "kept")
    title = "seconds from the fault: median (least to most) of the runs that recovered"
    made = table_of(title, names, left=("rung", "launcher"))
    for column in made.columns:
        column.no_wrap = column.header != "total"
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
    for count in ("steps_lost", "kept"):
        yield f"{row[count]['median']:g}" if row[count] else ""


def line(run: Fault) -> str:
    """The line to print when ``run`` has ended."""
    world = ""
    if run.world_size:
        world = f", world of {run.world_size}, {run.steps_lost} steps repeated, {run.kept} processes kept"
    return run.text(PHASES, world + ("" if run.warm is None else f", {run.warm} standbys"))


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"rungs:": "", **RUNGS},
        "sudo benchmarks/recovery.py                                    # all, an hour and more",
        "sudo benchmarks/recovery.py --launchers elastic --runs 5       # ours alone",
        "sudo benchmarks/recovery.py --rungs power --bound 120 --json power.json",
        state=True,
        keep=True,
    )
    add = parser.add_argument
    add("--runs", type=positive, default=3, metavar="N", help="of each rung and launcher (default: 3)")
    add("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), help="default: all")
    add("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="default: all")
    text = "how long to wait for a step before a run counts as stuck, through the queue 180 more (default: 60)"
    add("--bound", type=positive, default=60, metavar="SECONDS", help=text)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    runs: list[Fault] = []
    where: dict[str, Any] = {}
    with kept(runs), cluster(args.state) as at:
        if FT in args.launchers:
            LAUNCHERS[FT] += install_ft_launcher(at)
        if LIVE in args.launchers:
            LAUNCHERS[LIVE] += [f"--python={torch_214()}"]
        where = where_it_runs(at)
        pairs = [(rung, launcher) for rung in args.rungs for launcher in args.launchers]
        plan = [pair for pair in pairs if pair[1] in THROUGH_THE_QUEUE.get(pair[0], LAUNCHERS)] * args.runs
        for number, (rung, launcher) in enumerate(plan, 1):
            run = measure(at, rung, launcher, args.bound, args.keep)
            runs.append(run)
            print(f"{number}/{len(plan)} {line(run)}", flush=True)
            write_json(args.json, report(runs, where))
    if not runs:
        return 1
    show(table(summarize(runs)), width=180)
    print(origin(where, [run.busy_before for run in runs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
