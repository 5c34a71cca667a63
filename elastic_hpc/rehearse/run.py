"""Runs a training script on agents of this machine, carries out the acts of a rehearsal, and records what happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic_hpc.environment import LOCAL_NODE
from elastic_hpc.errors import ElasticError
from elastic_hpc.job.launch import LaunchConfig
from elastic_hpc.network.client import ask_leader
from elastic_hpc.record.events import EventReader
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.rehearse.plan import (
    TWO_LINES,
    Crash,
    DoneAct,
    Judgement,
    PlannedAct,
    ReportedStep,
    RoundStart,
    continued_from_before,
    count,
    judge,
)
from elastic_hpc.training.progress import STEP_LOG

_TICK = 0.05
_SHOW_INTERVAL = 5.0
"""Seconds between two shown steps."""
_HINT_AFTER = 10.0
"""Seconds without a step in the first round after which the rehearsal prints what the script must call."""
_KILL_TIMEOUT = 30.0
"""Seconds until killed agents and their workers count as stuck."""


@dataclass(frozen=True)
class RehearsalOptions:
    """What to rehearse. ``{folder}`` in an argument of the script becomes ``folder``."""

    script: str
    script_args: Sequence[str]
    nodes: int
    nproc_per_node: str
    steps: int
    """How many steps to wait for before each act, and after the last act."""
    timeout: float
    """Seconds without a step after which no further step is expected."""
    folder: Path
    """The folder for the run directory, the reported steps and the output of the agents; it must exist."""


class Rehearsal:
    """One training during the acts, and what was observed: steps, acts, crashes, and how it ended."""

    def __init__(self, options: RehearsalOptions, planned: Sequence[PlannedAct], show: Callable[[str], None]) -> None:
        self.steps: list[ReportedStep] = []
        self.acts: list[DoneAct] = []
        self.crashes: list[Crash] = []
        self.starts: dict[int, RoundStart] = {}
        """The starts by round."""
        self.end = ""
        """Why the rehearsal went no further; empty if all acts were carried out and enough steps followed."""
        self.finished = False
        """Whether the training has finished, so that it could not continue."""
        self._options, self._planned, self._show = options, planned, show
        self._began = time.monotonic()
        self._last_report = self._last_shown = self._began
        self._process: subprocess.Popen[bytes] | None = None
        self._rundir = RunDir(options.folder / "run").create()
        self._events = EventReader(self._rundir.path)
        self._nodes: dict[int, list[str]] = {}
        """The nodes of each round, in rank order."""
        self._round_at = self._began
        self._listens = False
        """Whether rank 0 calls ``drain_requested``, as then all ranks do."""
        self._hint_at: float | None = None
        """When to print that no step was reported; infinite after it was printed."""
        self._steps_offset = 0
        """Number of bytes already read from ``steps.jsonl``."""

    def judgements(self) -> list[Judgement]:
        """Whether the script resumed correctly after each act."""
        left = [planned.act for planned in self._planned[len(self.acts) :]]
        return judge(self.steps, self.acts, self.crashes, self.starts, end=self.end, finished=self.finished, left=left)

    def run(self) -> None:
        """Carry out the acts, as far as the training gets. Leaves no process behind, whatever is raised."""
        try:
            self._start(self._options.nodes)
            nodes = self._options.nodes
            for planned in self._planned:
                if not self._wait_for_steps(nodes):
                    return
                self._carry_out(planned)
                nodes = planned.nodes
            self._wait_for_steps(nodes)
        finally:
            self._kill()

    def _start(self, nodes: int) -> None:
        options = self._options
        config = LaunchConfig(
            local=nodes, nodes=f"1:{nodes}", nproc_per_node=options.nproc_per_node, max_restarts=len(self._planned) + 3
        )
        arguments = [argument.replace("{folder}", str(options.folder)) for argument in options.script_args]
        python, *srun = config.command(self._rundir.path, options.script, *arguments)
        at = srun.index(f"--run-dir={self._rundir.path}")
        command = [python, *srun[:at], "--again", *srun[at:]]
        with (options.folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, STEP_LOG: str(options.folder)},
                start_new_session=True,  # Ctrl-C is for the rehearsal, which then kills the agents
            )
        self._print(f"the training is started on {count(nodes, 'node')}")

    def _wait_for_steps(self, nodes: int) -> bool:
        """Wait until the round after the last act has done enough steps, and all ``nodes`` take part again: in place,
        the others continue without a node whose worker is restarted. If this does not happen, returns False, and
        ``end`` has the reason.
        """
        last = self.acts[-1].round if self.acts else 0
        self._last_report = time.monotonic()
        while True:
            ended = self._has_ended()  # before it reads the files, so that it misses no report before the end
            self._read_reports()
            if self.steps and (round_ := self.steps[-1].round) > last:
                first = next(step for step in self.steps if step.round == round_)
                whole = len(self._nodes.get(round_, ())) >= nodes and round_ in self.starts
                if (whole or time.monotonic() - self._round_at > self._options.timeout) and self.steps[
                    -1
                ].step - first.step + 1 >= self._options.steps:
                    return True
            if ended:
                self._conclude()
                return False
            if not self.steps and self._hint_at is not None and time.monotonic() > self._hint_at:
                self._hint_at = float("inf")
                self._print(f"no step reported yet; if the script does not report its steps, {TWO_LINES}")
            if time.monotonic() - self._last_report > self._options.timeout:
                self.end = f"no step for {self._options.timeout:g} s (--timeout)"
                return False
            time.sleep(_TICK)

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _conclude(self) -> None:
        verdict = self._rundir.read("verdict.json") or {"outcome": "failed", "reason": "the agents left no verdict"}
        self.finished = verdict["outcome"] == "finished"
        done = f"the training finished after step {self.steps[-1].step}" if self.steps else "the script ended"
        self.end = done if self.finished else str(verdict["reason"])

    def _carry_out(self, planned: PlannedAct) -> None:
        round_, now = self.steps[-1].round, time.time()
        match planned.act:
            case "worker":
                rank, pid = self._last_worker()
                self._record(DoneAct("worker", round_, now, f"rank {rank} was killed"))
                os.kill(pid, signal.SIGKILL)
            case "node" | "head":
                agents, leader = self._agents(), int((self._rundir.read("endpoint.json") or {})["node"])
                node = leader if planned.act == "head" else max(node for node in agents if node != leader)
                leads = ", which led," if planned.act == "head" else ""
                self._record(
                    DoneAct(planned.act, round_, now, f"the agent of node {node}{leads} and its workers were killed")
                )
                os.kill(agents[node], signal.SIGKILL)
            case _:
                self._start_again(planned, round_, now)

    def _start_again(self, planned: PlannedAct, round_: int, now: float) -> None:
        """Drain the workers if they call ``drain_requested``, else stop them; then restart the training."""
        listens = self._listens
        how = "asked to save and stop" if listens else "stopped, as it does not call drain_requested(),"
        what = f"the script was {how} and then started again on {count(planned.nodes, 'node')}"
        self._record(DoneAct(planned.act, round_, now, what, saves=listens))
        with contextlib.suppress(ElasticError):  # the training is ending already
            ask_leader(self._rundir, "drain" if listens else "stop")
        deadline = time.monotonic() + self._options.timeout
        while not self._has_ended() and time.monotonic() < deadline:
            self._read_reports()
            time.sleep(_TICK)
        self._read_reports()
        if self._has_ended() and (self._rundir.read("verdict.json") or {}).get("outcome") == "finished":
            return
        self._kill()
        self._start(planned.nodes)

    def _record(self, act: DoneAct) -> None:
        self.acts.append(act)
        self._print(f"{act.act}: {act.what}")

    def _read_reports(self) -> None:
        """Handle the events and steps that were added since the last call."""
        for event in self._events.read():
            self._on_event(event)
        with contextlib.suppress(FileNotFoundError), (self._options.folder / "steps.jsonl").open("rb") as file:
            file.seek(self._steps_offset)
            lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._steps_offset += len(whole)
            for line in whole.splitlines():
                self._on_step(json.loads(line))

    def _on_event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "round":
                self._last_report = time.monotonic()
                self._nodes[event["round"]], self._round_at = event["nodes"], self._last_report
                if self._hint_at is None:
                    self._hint_at = self._round_at + _HINT_AFTER
                self._print(f"round {event['round']} begins on {count(len(event['nodes']), 'node')}")
            case "started":
                start = self.starts[event["round"]] = RoundStart(event["kept"], event["warm"] + event["cold"])
                if start.kept:
                    self._print(f"{start.kept} of {start.kept + start.new} workers kept their process")
            case "take_over":
                self._print("another agent leads now")
            case "failure" if event["first"]:
                traceback = event.get("traceback") or ""
                self.crashes.append(Crash(event["round"], event["time"], event["message"], traceback))
                self._print(f"rank {event['rank']} failed: {event['message']}")

    def _on_step(self, report: Mapping[str, Any]) -> None:
        step = ReportedStep(report["round"], report["step"], report["loss"], report["world_size"])
        if report["not_in_place"] is not None:
            step = replace(step, not_in_place=report["not_in_place"])
        self._listens = report["listens"]
        self._last_report = time.monotonic()
        is_first = not self.steps or self.steps[-1].round != step.round
        self.steps.append(step)
        if is_first or self._last_report - self._last_shown > _SHOW_INTERVAL:
            loss = "" if step.loss is None else f", loss {step.loss:.4g}"
            self._print(
                f"round {step.round}: {count(step.world_size, 'worker')}, {'first ' * is_first}step {step.step}{loss}"
            )
        if continued_from_before(self.steps):
            self._print(
                f"the script began with step {self.steps[0].step}, so it continued from checkpoints of an earlier run; "
                "let it save in the rehearsal's {folder}, see --help, or remove these checkpoints"
            )

    def _print(self, text: str) -> None:
        self._last_shown = time.monotonic()
        self._show(f"{self._last_shown - self._began:6.1f} s  {text}")

    def _agents(self) -> dict[int, int]:
        """The pid of each node's agent."""
        assert self._process
        found = {}
        for pid in _children(self._process.pid):
            if (node := _environ(pid).get(LOCAL_NODE)) is not None:
                found[int(node)] = pid
        return found

    def _workers(self) -> dict[int, dict[str, str]]:
        """The environment of each worker, by pid."""
        pids = [pid for agent in self._agents().values() for pid in _children(agent)]
        return {pid: environ for pid in pids if "LOCAL_RANK" in (environ := _environ(pid))}

    def _last_worker(self) -> tuple[int, int]:
        """The highest rank, and its pid. For a worker that was kept, ``/proc`` shows its rank in an old round."""
        nodes = self._nodes[max(self._nodes)]
        node = int(nodes[-1].removeprefix("local"))
        local = {
            int(environ["LOCAL_RANK"]): pid
            for pid in _children(self._agents()[node])
            if "LOCAL_RANK" in (environ := _environ(pid))
        }
        last = max(local)
        return len(nodes) * (last + 1) - 1, local[last]

    def _kill(self) -> None:
        """Kill the agents. Their guards kill the workers."""
        if self._process is None:
            return
        workers = list(self._workers())
        deadline = time.monotonic() + _KILL_TIMEOUT
        if not self._has_ended():
            self._process.terminate()  # the launcher may be about to start agents
        while not self._has_ended() and time.monotonic() < deadline:
            for pid in self._agents().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_TICK)
        self._process.kill()
        self._process.wait()
        while any(map(_environ, workers)) and time.monotonic() < deadline:
            time.sleep(_TICK)


def _children(pid: int) -> list[int]:
    """The child processes of all threads of ``pid``; none if it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _environ(pid: int) -> dict[str, str]:
    """The environment with which ``pid`` was started; empty if it is gone."""
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}
    return {}
