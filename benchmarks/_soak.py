"""The job of soak.py: injects faults into it, and reads their effects from what it writes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from _cluster import Cluster, wait_for
from _faults import BREAKING, Draw, Fault
from _jobs import Job, wrong_steps
from _launchers import AGENT
from _report import ROOT, BenchmarkError

CHECKPOINT_EVERY = 5
MARGIN = 10
"""The job has recovered when it is this many steps beyond all earlier ones. Without such progress, a second crash of
the same kind would rightly end the job.
"""
NODES = "2:4"
STEPS_PER_EPOCH = 15

TRAIN = f"""\
\"\"\"examples/train_digits.py, which also reports its progress, and ends after as many epochs as a file says.\"\"\"
import runpy, sys
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
from elastic_hpc.training import report_progress

def report(optimizer, *_):
    report_progress(int(next(iter(optimizer.state.values()))["step"]))

register_optimizer_step_post_hook(report)
sys.argv += ["--checkpoint-every={CHECKPOINT_EVERY}", "--epochs=" + Path(__file__).with_name("epochs").read_text()]
runpy.run_path({str(ROOT / "examples" / "train_digits.py")!r}, run_name="__main__")
"""

T = TypeVar("T")


class Soak(Job):
    """One job, and the faults that soak.py injects into it."""

    def __init__(self, at: Cluster, folder: Path, deadline: float) -> None:
        """``deadline``: seconds after a fault within which the job must train again."""
        self._deadline = deadline
        self.faults: list[Fault] = []
        self._undo: list[tuple[float, str, Callable[[], subprocess.Popen[str] | None]]] = []
        self._healing: dict[str, subprocess.Popen[str]] = {}
        self._killed: dict[str, int] = {}  # round in which an agent died, by its node
        self._script = str(folder / "train.py")
        self._state_looked_up = 0.0  # when we last asked Slurm for the state of the job
        options = [f"--nodes={NODES}", "--nproc-per-node=1", "--max-restarts=1000", "--max-requeues=1000"]
        super().__init__(at, folder, None, *options, self._script)

    def submit(self, *argv: str) -> str:
        Path(self._script).write_text(TRAIN)
        self._set_epochs(1_000_000)
        return super().submit(*argv)

    def inject(self, group: int, drawn: Sequence[Draw]) -> list[Fault]:
        """Inject what was drawn, and wait until the job trains again."""
        before = max((step["step"] for step in self.steps()), default=0)
        made: list[Fault] = []
        for draw in drawn:
            self._wait_for_moment(draw, made[0].time if made else 0.0)
            made.append(self._break(draw, group))
            self.faults.append(made[-1])
        names = " and ".join(f"{fault.kind} of {','.join(fault.nodes) or 'login'}" for fault in made)
        lasting = any(fault.kind not in BREAKING for fault in made)
        oldest = max((fault.round + 1 for fault in made if fault.kind in BREAKING), default=0)
        if lasting:
            self._wait("the end of the fault", lambda: not self._undo and not self._healing)
        since = time.time()

        def trains() -> bool:
            last = self.steps()[-1]
            return last["step"] >= before + MARGIN and last["round"] >= oldest and (not lasting or last["time"] > since)

        self._wait(f"steps after {names}", trains)
        for fault in made:
            self._judge(fault, made)
        return made

    def wait_until_it_trains(self) -> None:
        self._wait("the first steps", lambda: len(self.steps()) > MARGIN)

    def finish(self) -> list[str]:
        """Let the training end, and say what is wrong with the job."""
        self._wait("the cluster to be whole", lambda: not self._undo and not self._healing)
        self._wait("training before the end", lambda: self.steps()[-1]["time"] > time.time() - 1)
        self._set_epochs(self.steps()[-1]["step"] // STEPS_PER_EPOCH + 4)
        pid = self._pid(self._world()[-1], worker=True)
        os.kill(pid, signal.SIGKILL)  # the workers of the next round read when to end
        state = self._wait("the job to end", self._end_state)
        problems = [f"the job ended as {state}"] if state != "COMPLETED" else []
        problems += wrong_steps(self.steps(), CHECKPOINT_EVERY)
        for fault in self.faults:
            if fault.kind in BREAKING and not fault.effects:
                problems.append(f"no event names {', '.join(fault.nodes)} after {fault.kind} at {fault.time:.3f}")
        try:
            wait_for("the job's processes to be gone", lambda: None if self._left_behind() else True, 60)
        except BenchmarkError:
            problems += [f"left behind: {line}" for line in self._left_behind()]
        return problems

    def evidence(self) -> str:
        """Everything that may show why the job does not train."""
        parts = [f"job {self.id} in {self.run_dir}", "faults:", *(json.dumps(asdict(fault)) for fault in self.faults)]
        parts += ["last events:", *(json.dumps(event) for event in self.events()[-40:])]
        parts += ["last steps:", *(json.dumps(step) for step in self.steps()[-4:])]
        parts += ["endpoint, state, verdict:", *map(self._text, ("endpoint.json", "state.json", "verdict.json"))]
        parts += ["Slurm:", self.at.run("scontrol", "show", "job", self.id, check=False)]
        parts += [self.at.mini("status"), "processes:", *self._left_behind()]
        for log in sorted((self.run_dir / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)[-6:]:
            parts += [f"{log.name}:", *log.read_text(errors="replace").splitlines()[-15:]]
        for log in self.folder.glob("slurm-*.out"):
            parts += [f"{log.name}:", *log.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(parts)

    def undo_all(self) -> None:
        """End all lasting faults, whatever happened."""
        for process in self._healing.values():
            process.communicate()
        for _, _, undo in sorted(self._undo, key=lambda entry: entry[1] != "login"):
            if process := undo():
                process.communicate()

    # inside

    def _set_epochs(self, epochs: int) -> None:
        (self.folder / "epochs.new").write_text(str(epochs))
        (self.folder / "epochs.new").replace(self.folder / "epochs")

    def _text(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return " ".join((self.run_dir / name).read_text().split())
        return f"no {name}"

    def _wait(self, what: str, look: Callable[[], T | None], seconds: float = 0.0) -> T:
        """``wait_for`` an answer that is not empty, and end faults when they are due."""

        def tended() -> T | None:
            self._tend()
            return look() or None

        return wait_for(what, tended, seconds or self._deadline)

    def _tend(self) -> None:
        now = time.monotonic()
        # healing a node needs slurmctld, so slurmctld is started first
        stopped = "login" in self._healing or any(where == "login" for _, where, _ in self._undo)
        for due in [entry for entry in self._undo if entry[0] <= now and (entry[1] == "login" or not stopped)]:
            self._undo.remove(due)
            if process := due[2]():
                self._healing[due[1]] = process
        for node, process in list(self._healing.items()):
            if process.poll() is not None:
                del self._healing[node]
                output, _ = process.communicate()
                if process.returncode:
                    raise BenchmarkError(f"healing {node}: {output}")
        if now - self._state_looked_up > 5:
            self._state_looked_up = now
            verdict = json.loads(self._text("verdict.json").replace("no verdict.json", "{}"))
            if verdict.get("outcome") == "failed":
                raise BenchmarkError(f"the job failed: {verdict['reason']}")
            state = self.at.job_state(self.id)
            if state in {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}:
                raise BenchmarkError(f"the job is {state}")

    def _end_state(self) -> str | None:
        state = self.at.job_state(self.id)
        return state if state in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} else None

    def _world(self) -> list[str]:
        """Nodes of the newest round."""
        nodes: list[str] = [event for event in self.events() if event["event"] == "round"][-1]["nodes"]
        return nodes

    def _round(self) -> int:
        return max((event["round"] for event in self.events() if event["event"] == "round"), default=0)

    def _leader(self) -> str:
        host: str = json.loads(self._text("endpoint.json"))["host"]
        return host

    def _free(self, kind: str) -> list[str] | None:
        """Nodes for a fault of ``kind``: in the world, and not broken by another fault; None while there are none. They
        have an agent, and a worker if a worker is to fail. One agent always remains: only an agent can requeue the job.
        """
        happened = [event["event"] for event in self.events() if event["event"] in {"round", "verdict"}]
        if happened[-1:] == ["verdict"]:
            return None  # the job is being requeued; there is no world before its next round
        broken = {node for node, round in self._killed.items() if round == self._round()}
        broken |= {node for _, node, _ in self._undo} | set(self._healing)
        nodes = [node for node in self._world() if node not in broken and self._pids(node, worker=False)]
        if kind in {"half-cut", "agent-kill", "node-power", "head-power"} and len(nodes) < 2:
            return None
        if kind.startswith("head-"):
            nodes = [node for node in nodes if node == self._leader()]
        if kind.startswith("node-"):
            nodes = [node for node in nodes if node != self._leader()]
        if kind.startswith("worker-"):
            nodes = [node for node in nodes if self._pids(node, worker=True)]
        return nodes or None

    def _wait_for_moment(self, draw: Draw, first: float) -> None:
        if draw.moment == "any":
            end = time.monotonic() + min(draw.delay, 3)
            self._wait("a random moment", lambda: time.monotonic() > end)
        elif draw.moment == "step":
            count = len(self.steps())
            self._wait("the next step", lambda: len(self.steps()) > count)
        elif draw.moment == "checkpoint":
            # Only this file shows that a checkpoint is being written. It exists for some milliseconds.
            with contextlib.suppress(BenchmarkError):
                wait_for("a checkpoint", lambda: (self.run_dir / "checkpoint.tmp").exists() or None, 10, every=0.0005)
        elif draw.moment in {"forming", "starting"}:
            names = {"round"} if draw.moment == "starting" else {"lost", "restart", "take_over"}
            with contextlib.suppress(BenchmarkError):  # some faults end no round
                later = lambda: any(event["event"] in names and event["time"] > first for event in self.events())  # noqa: E731
                self._wait(f"an event: {' or '.join(names)}", later, 8)

    def _break(self, draw: Draw, group: int) -> Fault:
        if draw.kind == "slurmctld":
            free: list[str] = []
        else:
            free = self._wait(f"a node for {draw.kind}", functools.partial(self._free, draw.kind))
        nodes = [free[int(draw.pick * len(free))]] if free else []
        if draw.kind == "half-cut":
            nodes = random.Random(draw.pick).sample(free, len(free) // 2)  # noqa: S311 - it has to repeat
        round_, moment = self._round(), time.time()
        if draw.kind == "slurmctld":
            self.at.slurmctld("stop")
            self._later(draw.seconds, "login", self._start_slurmctld)
        elif draw.kind.endswith(("-power", "-cut")):
            verb = "kill" if draw.kind.endswith("-power") else "cut"
            if draw.kind.endswith("-power"):
                self._killed |= dict.fromkeys(nodes, round_)  # no agent is there before the next round
            for node in nodes:
                moment = float(self.at.mini(verb, node).split()[0])
                self._later(draw.seconds, node, functools.partial(self.at.start, "heal", node))
        else:
            target, how = draw.kind.split("-")
            pid = self._pid(nodes[0], worker=target == "worker")
            moment = time.time()
            if draw.kind == "agent-kill":
                self._killed[nodes[0]] = round_
            number = {"kill": signal.SIGKILL, "crash": draw.crash, "freeze": signal.SIGSTOP}[how]
            os.kill(pid, number)
            if how == "freeze":
                self._later(draw.seconds, nodes[0], functools.partial(_continue, os.pidfd_open(pid)))
        lasts = draw.kind not in BREAKING
        return Fault(draw.kind, tuple(nodes), draw.moment, draw.seconds if lasts else None, moment, round_, group)

    def _start_slurmctld(self) -> None:
        self.at.slurmctld("start")
        wait_for("slurmctld", lambda: "UP" in self.at.run("scontrol", "ping", check=False) or None, 30)

    def _later(self, seconds: float, node: str, undo: Callable[[], subprocess.Popen[str] | None]) -> None:
        self._undo.append((time.monotonic() + seconds, node, undo))

    def _pids(self, node: str, *, worker: bool) -> list[int]:
        return self.at.pids(node, self._script, but=[AGENT]) if worker else self.at.pids(node, self._script, AGENT)

    def _pid(self, node: str, *, worker: bool) -> int:
        what = f"{'a worker' if worker else 'an agent'} on {node}"
        return self._wait(what, functools.partial(self._pids, node, worker=worker), 30)[0]

    def _judge(self, fault: Fault, group: Collection[Fault]) -> None:
        """Fill in the effects of ``fault``."""
        names = {node for other in group for node in other.nodes}
        effects = {"lost", "failure", "restart", "take_over", "verdict"}
        for event in self.events():
            text = json.dumps({key: value for key, value in event.items() if key != "traceback"})
            named = any(f'"{node}"' in text or f"{node} " in text for node in names) or "no leader was found" in text
            if event["time"] >= fault.time and event["event"] in effects and named:
                fault.effects.append(f"{event['event']}: {event.get('reason') or event.get('message')}")
        if fault.effects or fault.kind in BREAKING:
            after = (step for step in self.steps() if step["round"] > fault.round and step["time"] > fault.time)
            fault.next_step = next((step["time"] - fault.time for step in after), None)

    def _left_behind(self) -> list[str]:
        found = ((node, pid, argv) for node in self.at.nodes for pid, argv in self.at.in_jobs(node).items())
        return [f"{node} {pid} {' '.join(argv)[:160]}" for node, pid, argv in found]


def _continue(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    os.close(pidfd)
