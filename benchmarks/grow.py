"""Seconds until a running job trains with one node more, and how long it stands still for that, against torchrun.

Every pass submits benchmarks/train_steps.py to a real Slurm (bin/mini-slurm), which has two nodes for it at first. Our
job gets a third node from the queue, loses an agent, gets a spare, and loses another agent. The other launchers cannot
request nodes from Slurm, so the third node is given to them by hand. Training in place runs benchmarks/live_steps.py.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from _cluster import Cluster, cluster, wait_for
from _jobs import Job, Run, hundredths, summary
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
    launcher_template,
    peer_name,
    torch_214,
)
from _processes import start_time
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

SCRIPT, LIVE_SCRIPT = (str(ROOT / "benchmarks" / name) for name in ("train_steps.py", "live_steps.py"))
CHECKPOINT_EVERY = 100
SMALL, LARGE = 2, 3
"""Numbers of nodes of the two worlds, with one worker per node."""
PATIENCE = 90.0
"""Timeout in seconds for what is not measured: the start of a job, Slurm's start of an agent."""

DEAF = "elastic-deaf"
LAUNCHERS = {
    OURS: "elastic-sbatch --grow, and a script that saves and ends when it is asked to",
    LIVE: "the same in place: the workers keep their processes, on torch 2.14",
    DEAF: "with a script that does not listen",
    TORCHRUN: "the quickstart's command; the third node is given by hand, as to the following",
    OWN_STORE: "the same with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    FT: "NVIDIA's",
}
OF_US = (OURS, LIVE, DEAF)
AGENTS = {**dict.fromkeys(OF_US, AGENT), FT: FT_MODULE}
"""A word of the agents' command line, where they are not torchrun's."""
LAST_CALL = "--rdzv-conf=last_call_timeout=3"
"""For the other launchers, which would otherwise wait 30 s before they start with two of at most three nodes. A world
of three is full and forms immediately.
"""
RUNGS = {
    "grow": "a third node: from the start of its agent's process to a world of three",
    "loss": "the agent of a node that is not the head is killed, no spare is there: from that to a world of two",
    "replace": "and further, until the agent that is started in its place trains in a world of three",
    "spare": "the same agent is killed, a spare is there: from that to a world of three",
}
PHASES = ("anew", "joins", "others", "stops", "round", "start", "standstill", "total")


@dataclass(frozen=True, kw_only=True)
class Change(Run):
    """One change of the world. ``outcome`` is ``done`` if all went well, ``overtaken`` if the restarted agent joined
    before the world of the remaining agents had done a step. ``total``: from the start of the new agent's process, or
    else from the kill, to the end of the new world's first step. ``joins``, ``others``, ``stops``, ``round`` and
    ``start`` add up to it, and are known only for our launchers.
    """

    standstill: float | None = None
    """From the last step of the old world to the first step of the new world."""
    anew: float | None = None
    """From the kill to ``agent_restart``, when Slurm has started the new agent; a part of ``joins``."""
    joins: float | None = None
    """To the agent's ``join``."""
    others: float | None = None
    """From there to the last step of the old world: the leader waits for further agents, then notifies the workers."""
    stops: float | None = None
    """From there, or else from the kill, to ``restart``: the workers save and end, and the leader learns of it."""
    world_size: int | None = None
    repeated: int | None = None
    """Steps that the new world repeated."""


class Growing(Job):
    """A job that trains on two nodes and may have three."""

    def __init__(self, at: Cluster, launcher: str, options: Sequence[str]) -> None:
        """``options``: how to submit with ``launcher``."""
        self.launcher = launcher
        self.script = LIVE_SCRIPT if launcher == LIVE else SCRIPT
        self.head, self.victim, self.third, self.fourth = at.nodes[:4]
        self.busy_before = busy()
        self._taken: dict[str, str] = {}
        folder = at.home / f"grow-{launcher}"
        if launcher in OF_US:
            self._take(at, self.third, self.fourth)
        nodes = [f"--nodes={SMALL}:{LARGE}", "--nproc-per-node=1", "--exclusive"]
        arguments = [f"--folder={folder}", f"--checkpoint-every={CHECKPOINT_EVERY}"]
        arguments += ["--listen"] if launcher == OURS else []
        super().__init__(at, folder, folder / "steps.jsonl", *nodes, *options, self.script, *arguments)

    def submit(self, *argv: str) -> str:
        if self.launcher in OF_US:
            return super().submit(*argv)
        endpoint = ["--rdzv-id=grow", f"--rdzv-endpoint={self.head}:29400"]
        (self.folder / "job.sbatch").write_text(self.elastic_sbatch("--dry-run", *endpoint, *argv))
        return self._sbatch(self.head, self.victim)

    def bring_third(self) -> float:
        """When the agent's process started, in seconds since the epoch, to a hundredth."""
        if self._taken:
            self.free(self.third)
        else:
            self._sbatch(self.third)
        word = AGENTS.get(self.launcher, TORCHRUN_MODULE)

        def started() -> float | None:
            return min(map(start_time, self.at.pids(self.third, word, self.script)), default=None)

        return wait_for(f"an agent on {self.third}", started, PATIENCE)

    def bring_spare(self) -> None:
        self.free(self.fourth)
        named = {"event": "join", "node": self.fourth}

        def came() -> bool | None:
            return any(named.items() <= event.items() for event in self.events()) or None

        wait_for("the spare", came, PATIENCE)

    def free(self, node: str) -> None:
        """End the job that has ``node``."""
        self.at.run("scancel", self._taken.pop(node))

    def kill_agent(self) -> float:
        (agent,) = self.at.pids(self.victim, AGENTS[self.launcher], self.script)
        moment = time.time()
        os.kill(agent, signal.SIGKILL)
        return moment

    def wait_until_steady(self, size: int) -> None:
        """Wait until a world of ``size`` has trained for a while and is half way between two checkpoints."""

        def steady() -> bool | None:
            steps = self.steps()
            world = [step for step in steps if step["began"] == steps[-1]["began"]]
            half = bool(steps) and 0.4 < steps[-1]["step"] % CHECKPOINT_EVERY / CHECKPOINT_EVERY < 0.6
            return (half and len(world) > CHECKPOINT_EVERY / 2 and world[-1]["world_size"] == size) or None

        self.wait_for_steps(steady, PATIENCE)

    def change(self, since: float, size: int | None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The last step before a new world, of ``size`` or of any size, and the first step of that world."""
        for before, after in pairwise(self.steps()):
            new = after["time"] > since and after["began"] != before["began"]
            if new and size in {None, after["world_size"]}:
                return before, after
        return None

    # inside

    def _sbatch(self, *nodes: str) -> str:
        options = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
        return self.at.run("sbatch", "--parsable", *options, "job.sbatch", cwd=self.folder).strip()

    def _take(self, at: Cluster, *nodes: str) -> None:
        """Run another user's job on each of ``nodes``."""
        for node in nodes:
            options = ["--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=exec sleep 900"]
            self._taken[node] = at.run("sbatch", "--parsable", *options, cwd=at.home).strip()
        for node, job in self._taken.items():
            wait_for(f"job {job} on {node}", functools.partial(_runs, at, job), PATIENCE)


def _runs(at: Cluster, job: str) -> bool | None:
    return at.job_state(job) == "RUNNING" or None


def measure(at: Cluster, launcher: str, options: Sequence[str], deadline: float, keep: Path | None) -> Iterator[Change]:
    """One job of ``launcher`` from its submission to its end, with all changes one after another."""
    job = Growing(at, launcher, options)

    def change(rung: str, moment: float, size: int | None) -> Change:
        steps, run = job.watch(lambda: job.change(moment, size), moment, deadline)
        result = Change(rung=rung, launcher=launcher, busy_before=job.busy_before, **run)
        return _split(result, job, moment, *steps) if steps else result

    try:
        job.wait_until_steady(SMALL)
        yield change("grow", job.bring_third(), LARGE)
        if launcher not in {OURS, LIVE}:
            return
        job.wait_until_steady(LARGE)
        killed = job.kill_agent()
        loss = change("loss", killed, None)
        yield replace(loss, outcome="overtaken") if loss.world_size == LARGE else loss
        yield change("replace", killed, LARGE)
        job.bring_spare()
        job.wait_until_steady(LARGE)
        yield change("spare", job.kill_agent(), None)
    finally:
        job.clear(keep)


def _split(run: Change, job: Growing, moment: float, before: dict[str, Any], after: dict[str, Any]) -> Change:
    last, first = before["time"], after["time"]
    fields: dict[str, Any] = asdict(run) | {
        "outcome": "done",
        "total": first - moment,
        "standstill": first - last,
        "world_size": after["world_size"],
        "repeated": before["step"] + 1 - after["step"],
    }
    events = [event for event in job.events() if moment <= event["time"] <= first]
    of_round = {event["event"]: event["time"] for event in events if event.get("round") == after["round"]}
    if of_round:
        fields |= {"round": of_round["round"] - of_round["restart"], "start": first - of_round["round"]}
        if run.rung in {"grow", "replace"}:
            joined = max(event["time"] for event in events if event["event"] == "join")
            anew = [event["time"] - moment for event in events if event["event"] == "agent_restart"]
            fields |= {"joins": joined - moment, "others": last - joined, "stops": of_round["restart"] - last}
            fields |= {"anew": anew[0] if anew else None}
        else:
            fields |= {"stops": of_round["restart"] - moment}
    return Change(**fields)


def summarize(runs: Sequence[Change]) -> list[dict[str, Any]]:
    """One row for each rung and launcher: counts, median, minimum and maximum of each phase, ratios to ours."""
    rows = summary(runs, RUNGS, list(LAUNCHERS), ("done", "overtaken", "stuck", "ended"), (*PHASES, "repeated"))
    of_ours = next((row for row in rows if row["launcher"] == OURS), None)
    for row in rows:
        for name in ("standstill", "total"):
            ours = of_ours[name] if of_ours and row["launcher"] != OURS else None
            row[f"{name}_times_ours"] = row[name]["median"] / ours["median"] if ours and row[name] else None
    return rows


def lines(rows: Sequence[dict[str, Any]], torch: str) -> list[dict[str, Any]]:
    """For run.py's table: each peer against ours. ``torch``: its version."""
    ours = next((row for row in rows if row["launcher"] == OURS and row["rung"] == "grow"), None)
    shown = []
    for row in rows:
        if row["launcher"] == OURS or not ours:
            continue
        peer = "ours, in place" if row["launcher"] == LIVE else peer_name(row["launcher"], torch)
        for name, what in (("standstill", "training stands still"), ("total", "until it trains with it")):
            mine, theirs = (side[name]["median"] if side[name] else None for side in (ours, row))
            note = "" if theirs else "not within the deadline"
            shown.append(figure(f"a third node, {what}", mine, peer, theirs, note=note))
    return shown


def table(rows: Sequence[dict[str, Any]]) -> Table:
    names = ("anew", "joins", "others", "stops", "new round", "start", "stood still", "of ours", "total", "of ours")
    title = "seconds, medians (least to most) of the runs that got there"
    made = table_of(title, ("", "launcher", "done", *names, "repeated"), left=("", "launcher"))
    for row in rows:
        cells = [hundredths(row[name]["median"]) if row[name] else "" for name in PHASES[:-2]]
        for name in ("standstill", "total"):
            ratio = row[f"{name}_times_ours"]
            cells += [spread_text(row[name], 1), f"x {ratio:.1f}" if ratio else ""]
        steps = spread_text(row["repeated"], 0)
        made.add_row(row["rung"], row["launcher"], f"{row['done']} of {row['runs']}", *cells, steps)
    return made


def line(run: Change) -> str:
    """The line to print when ``run`` has ended."""
    return run.text(PHASES, "" if run.repeated is None else f", {run.repeated} steps repeated")


def how_to_submit(at: Cluster, launchers: Sequence[str]) -> dict[str, list[str]]:
    grow = ["--grow", "--grow-every=1"]
    if len(at.nodes) <= LARGE:
        raise BenchmarkError(f"{len(at.nodes)} nodes: expected a mini-slurm of {LARGE + 1} or more")
    options = {OURS: [*grow, "--spares=1"], DEAF: grow}
    if LIVE in launchers:
        options[LIVE] = [*options[OURS], f"--python={torch_214()}"]
    if {TORCHRUN, OWN_STORE} & set(launchers):
        template = launcher_template(at, TORCHRUN, TORCHRUN_MODULE, LAST_CALL)
        options |= {TORCHRUN: [template], OWN_STORE: [template, OWN_STORE_OPTION]}
    if FT in launchers:
        options[FT] = install_ft_launcher(at, LAST_CALL)
    return options


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"what is measured:": "", **RUNGS, "launchers:": "", **LAUNCHERS},
        "sudo benchmarks/grow.py                                  # all",
        "sudo benchmarks/grow.py --launchers elastic --runs 1     # ours alone, once",
        state=True,
        keep=True,
    )
    add = parser.add_argument
    add("--runs", type=positive, default=3, metavar="N", help="of each launcher (default: 3)")
    add("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="default: all")
    text = "to wait for a step of the new world; a launcher that does not get there is not run again (default: 45)"
    add("--deadline", type=positive, default=45, metavar="SECONDS", help=text)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    runs: list[Change] = []
    where: dict[str, Any] = {}
    began = time.monotonic()
    with kept(runs), cluster(args.state) as at:
        where = machine() | {"slurm": at.slurm_version()}
        at.reset()
        options = how_to_submit(at, args.launchers)
        for launcher in args.launchers * args.runs:
            if any(run.launcher == launcher and run.outcome in {"stuck", "ended"} for run in runs):
                continue
            for run in measure(at, launcher, options[launcher], args.deadline, args.keep):
                runs.append(run)
                print(f"+{time.monotonic() - began:.0f} s {line(run)}", flush=True)
                report = {"machine": where, "deadline": args.deadline, "summary": summarize(runs)}
                write_json(args.json, report | {"runs": list(map(asdict, runs))})
    if not runs:
        return 1
    show(table(summarize(runs)), width=170)
    print(origin(where, [run.busy_before for run in runs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
