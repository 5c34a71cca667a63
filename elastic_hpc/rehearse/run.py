"""Runs a training script on a few agents of this machine, does to it what happens on a cluster, and watches it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_hpc.environment import LOCAL_NODE
from elastic_hpc.errors import ElasticError
from elastic_hpc.job.launch import LaunchConfig
from elastic_hpc.network.client import ask_leader
from elastic_hpc.record.rundir import EventReader, RunDir
from elastic_hpc.rehearse.plan import Crash, Done, Planned, Step, count
from elastic_hpc.training import LOCAL_DIR, PROGRESS_FILE, STEP_LOG, read_progress

_TICK = 0.05
_TOLD_EVERY = 5.0
_ENDS = 30.0
"""Seconds until agents that were killed, and their workers, are taken for stuck."""


@dataclass(frozen=True)
class Asked:
    """What is rehearsed. ``{folder}`` in an argument of the script becomes ``folder``."""

    script: str
    script_args: Sequence[str]
    nodes: int
    nproc_per_node: str
    steps: int
    """So many steps are done before an act, and after the last one."""
    timeout: float
    """Seconds without a step after which nothing more is expected."""
    folder: Path
    """For the run directory, the steps and what the agents print; exists."""


class Rehearsal:
    """One training under the acts, and what was seen of it: steps, acts, crashes, and how it ended."""

    def __init__(self, asked: Asked, planned: Sequence[Planned], show: Callable[[str], None]) -> None:
        self.steps: list[Step] = []
        self.acts: list[Done] = []
        self.crashes: list[Crash] = []
        self.end = ""
        """Why it went no further; empty if all acts were carried out and enough steps followed."""
        self.finished = False
        """The training is over, so that there was nothing to go on with."""
        self._asked, self._planned, self._show = asked, planned, show
        self._began = time.monotonic()
        self._heard = self._told = self._began
        self._process: subprocess.Popen[bytes] | None = None
        self._rundir = RunDir(asked.folder / "run").create()
        self._events, self._heeded, self._offset = EventReader(self._rundir), 0, 0

    @property
    def left(self) -> list[str]:
        """The acts that were not carried out."""
        return [planned.act for planned in self._planned[len(self.acts) :]]

    def run(self) -> None:
        """Carry out the acts, as far as the training gets. Leaves no process, whatever is raised."""
        try:
            self._start(self._asked.nodes)
            for planned in self._planned:
                if not self._gets_on():
                    return
                self._carry_out(planned)
            self._gets_on()
        finally:
            self._kill()

    def _start(self, nodes: int) -> None:
        asked = self._asked
        config = LaunchConfig(
            local=nodes,
            nodes=f"1:{nodes}",
            nproc_per_node=asked.nproc_per_node,
            max_restarts=len(self._planned) + 3,
        )
        arguments = [argument.replace("{folder}", str(asked.folder)) for argument in asked.script_args]
        python, *srun = config.command(self._rundir.path, asked.script, *arguments)
        at = srun.index(f"--run-dir={self._rundir.path}")
        command = [python, *srun[:at], "--again", *srun[at:]]
        with (asked.folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, STEP_LOG: str(asked.folder)},
                start_new_session=True,  # Ctrl-C is for the rehearsal, which then kills the agents
            )
        self._say(f"the training is started on {count(nodes, 'node')}")

    def _gets_on(self) -> bool:
        """Wait until the round after the last act has done enough steps; else ``end`` says why it has not."""
        last = self.acts[-1].round if self.acts else 0
        self._heard = time.monotonic()
        while True:
            over = self._over()  # before the files are read, so that nothing of the end is missed
            self._look()
            if self.steps and (round_ := self.steps[-1].round) > last:
                first = next(step for step in self.steps if step.round == round_)
                if self.steps[-1].step - first.step + 1 >= self._asked.steps:
                    return True
            if over:
                self._conclude()
                return False
            if time.monotonic() - self._heard > self._asked.timeout:
                self.end = f"no step for {self._asked.timeout:g} s (--timeout)"
                return False
            time.sleep(_TICK)

    def _over(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _conclude(self) -> None:
        verdict = self._rundir.read("verdict.json") or {"outcome": "failed", "reason": "the agents left no verdict"}
        self.finished = verdict["outcome"] == "finished"
        done = f"the training was over after step {self.steps[-1].step}" if self.steps else "the script ended"
        self.end = done if self.finished else str(verdict["reason"])

    def _carry_out(self, planned: Planned) -> None:
        round_, now = self.steps[-1].round, time.time()
        match planned.act:
            case "worker":
                rank, pid = max((int(environ["RANK"]), pid) for pid, environ in self._workers().items())
                self._done(Done("worker", round_, now, f"rank {rank} was killed"))
                os.kill(pid, signal.SIGKILL)
            case "node" | "head":
                agents, leader = self._agents(), int((self._rundir.read("endpoint.json") or {})["node"])
                node = leader if planned.act == "head" else max(node for node in agents if node != leader)
                leads = ", which led," if planned.act == "head" else ""
                self._done(
                    Done(planned.act, round_, now, f"the agent of node {node}{leads} and its workers were killed")
                )
                os.kill(agents[node], signal.SIGKILL)
            case _:
                self._start_again(planned, round_, now)

    def _start_again(self, planned: Planned, round_: int, now: float) -> None:
        """Have the workers save and stop, if they listen, else stop them; then start the training once more."""
        listens = self._listens()
        how = "asked to save and stop" if listens else "stopped, as it does not call drain_requested(),"
        what = f"the script was {how} and then started again on {count(planned.nodes, 'node')}"
        self._done(Done(planned.act, round_, now, what, saves=listens))
        with contextlib.suppress(ElasticError):  # it is ending already
            ask_leader(self._rundir, "drain" if listens else "stop")
        deadline = time.monotonic() + self._asked.timeout
        while not self._over() and time.monotonic() < deadline:
            self._look()
            time.sleep(_TICK)
        self._look()
        if self._over() and (self._rundir.read("verdict.json") or {}).get("outcome") == "finished":
            return
        self._kill()
        self._start(planned.nodes)

    def _done(self, act: Done) -> None:
        self.acts.append(act)
        self._say(f"{act.act}: {act.what}")

    def _look(self) -> None:
        """Take in what was reported since the last look."""
        self._events.read()
        for event in self._events.events[self._heeded :]:
            self._heeded += 1
            self._heed(event)
        with contextlib.suppress(FileNotFoundError), (self._asked.folder / "steps.jsonl").open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                self._step(json.loads(line))

    def _heed(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "round":
                self._heard = time.monotonic()
                self._say(f"round {event['round']} begins on {count(len(event['nodes']), 'node')}")
            case "take_over":
                self._say("another agent leads now")
            case "failure" if event["first"]:
                known = event["round"], event["time"], event["message"], event.get("traceback") or ""
                self.crashes.append(Crash(*known))
                self._say(f"rank {event['rank']} failed: {event['message']}")

    def _step(self, said: Mapping[str, Any]) -> None:
        step = Step(said["round"], said["step"], said["loss"], said["world_size"])
        self._heard = time.monotonic()
        anew = not self.steps or self.steps[-1].round != step.round
        self.steps.append(step)
        if anew or self._heard - self._told > _TOLD_EVERY:
            loss = "" if step.loss is None else f", loss {step.loss:.4g}"
            self._say(
                f"round {step.round}: {count(step.world_size, 'worker')}, {'first ' * anew}step {step.step}{loss}"
            )

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        self._show(f"{self._told - self._began:6.1f} s  {text}")

    def _agents(self) -> dict[int, int]:
        """Pid of each node's agent."""
        assert self._process
        found = {}
        for pid in _children(self._process.pid):
            if (node := _environ(pid).get(LOCAL_NODE)) is not None:
                found[int(node)] = pid
        return found

    def _workers(self) -> dict[int, dict[str, str]]:
        """The environment of each worker."""
        pids = [pid for agent in self._agents().values() for pid in _children(agent)]
        return {pid: environ for pid in pids if "RANK" in (environ := _environ(pid))}

    def _listens(self) -> bool:
        """Whether all workers call ``drain_requested``."""
        told = [
            read_progress(Path(environ[LOCAL_DIR], PROGRESS_FILE.format(local_rank=environ["LOCAL_RANK"])))
            for environ in self._workers().values()
        ]
        return bool(told) and all(progress is not None and progress.listens for progress in told)

    def _kill(self) -> None:
        """Kill what runs. The workers are killed by the agents' guards."""
        if self._process is None:
            return
        workers = list(self._workers())
        deadline = time.monotonic() + _ENDS
        if not self._over():
            self._process.terminate()  # it may be about to start agents
        while not self._over() and time.monotonic() < deadline:
            for pid in self._agents().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_TICK)
        self._process.kill()
        self._process.wait()
        while any(map(_environ, workers)) and time.monotonic() < deadline:
            time.sleep(_TICK)


def _children(pid: int) -> list[int]:
    """Of all threads of ``pid``; none if it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _environ(pid: int) -> dict[str, str]:
    """What ``pid`` was started with; empty if it is gone."""
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}
    return {}
