"""Random faults, one after another and sometimes two at once, in one job on a real Slurm. It must survive them all.

The job is examples/train_digits.py on 2 to 4 nodes of bin/mini-slurm. The next fault comes when it trains again; at the
end it must have completed, with every step where it belongs and no process left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from _cluster import (
    ROOT,
    BenchmarkError,
    Cluster,
    add_state,
    cluster,
    json_lines,
    machine,
    parser_with,
    positive,
    wait_for,
    wrong_steps,
)
from rich.console import Console
from rich.table import Table

CHECKPOINT_EVERY = 5
MARGIN = 10
"""Steps beyond all earlier ones after which the job trains again. The same crash twice without progress is no accident
to be survived: it ends the job.
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

KINDS = {
    "worker-kill": "SIGKILL to a worker",
    "worker-crash": "SIGSEGV, SIGABRT, SIGBUS or SIGTERM to a worker",
    "worker-freeze": "SIGSTOP to a worker, SIGCONT after 1 to 12 s",
    "agent-kill": "SIGKILL to an agent, on any node",
    "agent-freeze": "SIGSTOP to an agent, SIGCONT after 1 to 12 s",
    "node-power": "power loss of a node that does not lead, healed after 1 to 12 s",
    "head-power": "power loss of the leader's node",
    "node-cut": "partition: a node that does not lead has no links for 1 to 12 s",
    "head-cut": "the leader's node has none",
    "half-cut": "each node of a random half has none",
    "slurmctld": "slurmctld ends, and is started again after 1 to 12 s",
}
BREAKING = {"worker-kill", "worker-crash", "agent-kill", "node-power", "head-power"}
"""End the round for certain; after the others the job may also train on."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGTERM)
MOMENTS = ("any", "step", "checkpoint")
"""Of the first fault: a random one, right after a step, while a checkpoint is written."""
SECOND_MOMENTS = ("at once", "forming", "starting")
"""Of a second fault: with the first, while the next round forms, while its workers start."""

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """What chance says about one fault, before anything has run."""

    kind: str
    moment: str
    pick: float
    """Which of the possible nodes, 0 to 1."""
    seconds: float
    """How long it lasts, for faults that end."""
    delay: float
    """Before it, for ``any`` moment."""
    crash: signal.Signals


@dataclass
class Fault:
    """One that was injected."""

    kind: str
    nodes: tuple[str, ...]
    moment: str
    seconds: float | None
    """How long it lasted; None where nothing ends it."""
    time: float
    round: int
    """The newest round that was formed by then."""
    group: int
    """Those that came together have the same."""
    effects: list[str] = field(default_factory=list)
    """Events that name one of its nodes, until the next fault."""
    next_step: float | None = None
    """Seconds to the first step of the next round; None if it ended no round."""


def draws(seed: int, faults: int, kinds: Sequence[str]) -> list[list[Draw]]:
    """What to inject, ``faults`` in all; two in one list come together. All kinds come before any comes again."""
    rng = random.Random(seed)  # noqa: S311 - it has to repeat
    bag: list[str] = []

    def draw(moments: Sequence[str], but: str = "") -> Draw:
        if not set(bag) - {but}:
            bag.extend(rng.sample(kinds, len(kinds)))
        kind = next(kind for kind in bag if kind != but)
        bag.remove(kind)
        return Draw(
            kind, rng.choice(moments), rng.random(), rng.uniform(1, 12), rng.expovariate(1), rng.choice(CRASHES)
        )

    made: list[list[Draw]] = []
    while (left := faults - sum(map(len, made))) > 0:
        made.append([draw(MOMENTS)])
        if left > 1 and len(kinds) > 1 and rng.random() < 0.25:
            made[-1].append(draw(SECOND_MOMENTS, but=made[-1][0].kind))
    return made


class Soak:
    """One job, and what is done to it."""

    def __init__(self, at: Cluster, folder: Path, deadline: float) -> None:
        """``deadline``: seconds after a fault in which the job must train again."""
        self._at = at
        self._deadline = deadline
        self.folder = folder
        self.faults: list[Fault] = []
        self._undo: list[tuple[float, str, Callable[[], subprocess.Popen[str] | None]]] = []
        self._healing: dict[str, subprocess.Popen[str]] = {}
        self._killed: dict[str, int] = {}  # round in which an agent was killed, by its node
        self._script = str(folder / "train.py")
        self._asked = 0.0
        at.run("mkdir", "-p", str(folder))
        Path(self._script).write_text(TRAIN)
        self._set_epochs(1_000_000)
        options = [f"--nodes={NODES}", "--nproc-per-node=1", "--max-restarts=1000", "--max-requeues=1000"]
        submitter = str(Path(sys.executable).with_name("elastic-sbatch"))
        self.job = at.run(submitter, "--parsable", *options, self._script, cwd=folder).strip()

    @property
    def run_dir(self) -> Path:
        return self.folder / "elastic-logs" / self.job

    def events(self) -> list[dict[str, Any]]:
        return json_lines(self.run_dir / "events.jsonl")

    def steps(self) -> list[dict[str, Any]]:
        return json_lines(self.run_dir / "steps.jsonl")

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
        """All that may tell why the job does not train."""
        parts = [f"job {self.job} in {self.run_dir}", "faults:", *(json.dumps(asdict(fault)) for fault in self.faults)]
        parts += ["last events:", *(json.dumps(event) for event in self.events()[-40:])]
        parts += ["last steps:", *(json.dumps(step) for step in self.steps()[-4:])]
        parts += ["endpoint, state, verdict:", *map(self._text, ("endpoint.json", "state.json", "verdict.json"))]
        parts += ["Slurm:", self._at.run("scontrol", "show", "job", self.job, check=False)]
        parts += [self._at.mini("status"), "processes:", *self._left_behind()]
        for log in sorted((self.run_dir / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)[-6:]:
            parts += [f"{log.name}:", *log.read_text(errors="replace").splitlines()[-15:]]
        for log in self.folder.glob("slurm-*.out"):
            parts += [f"{log.name}:", *log.read_text(errors="replace").splitlines()[-25:]]
        return "\n".join(parts)

    def undo_all(self) -> None:
        """Leave no fault behind, whatever happened."""
        healing = list(self._healing.values())
        healing += [process for _, _, undo in self._undo if (process := undo())]
        for process in healing:
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
        """``wait_for`` an answer that is not empty, while faults end when their time has come."""

        def tended() -> T | None:
            self._tend()
            return look() or None

        return wait_for(what, tended, seconds or self._deadline)

    def _tend(self) -> None:
        now = time.monotonic()
        for due in [entry for entry in self._undo if entry[0] <= now]:
            self._undo.remove(due)
            if process := due[2]():
                self._healing[due[1]] = process
        for node, process in list(self._healing.items()):
            if process.poll() is not None:
                del self._healing[node]
                said, _ = process.communicate()
                if process.returncode:
                    raise BenchmarkError(f"healing {node}: {said}")
        if now - self._asked > 5:
            self._asked = now
            verdict = json.loads(self._text("verdict.json").replace("no verdict.json", "{}"))
            if verdict.get("outcome") == "failed":
                raise BenchmarkError(f"the job failed: {verdict['reason']}")
            state = self._at.job_state(self.job)
            if state in {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}:
                raise BenchmarkError(f"the job is {state}")

    def _end_state(self) -> str | None:
        state = self._at.job_state(self.job)
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
        """Nodes for a fault of ``kind``: in the world, and not broken by another one; None while there is none. One
        agent is always left: nobody else could bring the job back.
        """
        broken = {node for node, round in self._killed.items() if round == self._round()}
        broken |= {node for _, node, _ in self._undo} | set(self._healing)
        nodes = [node for node in self._world() if node not in broken]
        if kind in {"half-cut", "agent-kill", "node-power", "head-power"} and len(nodes) < 2:
            return None
        if kind.startswith("head-"):
            nodes = [node for node in nodes if node == self._leader()]
        if kind.startswith("node-"):
            nodes = [node for node in nodes if node != self._leader()]
        return nodes or None

    def _wait_for_moment(self, draw: Draw, first: float) -> None:
        if draw.moment == "any":
            end = time.monotonic() + min(draw.delay, 3)
            self._wait("a random moment", lambda: time.monotonic() > end)
        elif draw.moment == "step":
            count = len(self.steps())
            self._wait("the next step", lambda: len(self.steps()) > count)
        elif draw.moment == "checkpoint":
            # nothing says when one is being written but that file, which is there for some milliseconds
            with contextlib.suppress(BenchmarkError):
                wait_for("a checkpoint", lambda: (self.run_dir / "checkpoint.tmp").exists() or None, 10, every=0.0005)
        elif draw.moment in {"forming", "starting"}:
            names = {"round"} if draw.moment == "starting" else {"lost", "restart", "take_over"}
            with contextlib.suppress(BenchmarkError):  # after some faults no round ends
                news = lambda: any(event["event"] in names and event["time"] > first for event in self.events())  # noqa: E731
                self._wait(f"an event: {' or '.join(names)}", news, 8)

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
            self._at.slurmctld("stop")
            self._later(draw.seconds, "login", lambda: self._at.slurmctld("start"))
        elif draw.kind.endswith(("-power", "-cut")):
            verb = "kill" if draw.kind.endswith("-power") else "cut"
            for node in nodes:
                moment = float(self._at.mini(verb, node).split()[0])
                self._later(draw.seconds, node, functools.partial(self._at.start, "heal", node))
        else:
            what, how = draw.kind.split("-")
            pid = self._pid(nodes[0], worker=what == "worker")
            moment = time.time()
            if draw.kind == "agent-kill":
                self._killed[nodes[0]] = round_
            number = {"kill": signal.SIGKILL, "crash": draw.crash, "freeze": signal.SIGSTOP}[how]
            os.kill(pid, number)
            if how == "freeze":
                self._later(draw.seconds, nodes[0], functools.partial(_continue, os.pidfd_open(pid)))
        lasts = draw.kind not in BREAKING
        return Fault(draw.kind, tuple(nodes), draw.moment, draw.seconds if lasts else None, moment, round_, group)

    def _later(self, seconds: float, node: str, undo: Callable[[], subprocess.Popen[str] | None]) -> None:
        self._undo.append((time.monotonic() + seconds, node, undo))

    def _pid(self, node: str, *, worker: bool) -> int:
        agent = "elastic_hpc.agent"

        def found() -> list[int]:
            if worker:
                return self._at.pids(node, self._script, but=[agent])
            return self._at.pids(node, self._script, agent)

        return self._wait(f"{'a worker' if worker else 'an agent'} on {node}", found, 30)[0]

    def _judge(self, fault: Fault, group: Collection[Fault]) -> None:
        """Fill in what became of ``fault``."""
        names = {node for each in group for node in each.nodes}
        telling = {"lost", "failure", "restart", "take_over", "verdict"}
        for event in self.events():
            said = json.dumps({key: value for key, value in event.items() if key != "traceback"})
            named = any(f'"{node}"' in said or f"{node} " in said for node in names) or "no leader was found" in said
            if event["time"] >= fault.time and event["event"] in telling and named:
                fault.effects.append(f"{event['event']}: {event.get('reason') or event.get('message')}")
        if fault.effects or fault.kind in BREAKING:
            after = (step for step in self.steps() if step["round"] > fault.round and step["time"] > fault.time)
            fault.next_step = next((step["time"] - fault.time for step in after), None)

    def _left_behind(self) -> list[str]:
        found = []
        for node in self._at.nodes:
            found += [f"{node} {pid} {' '.join(argv)[:160]}" for pid, argv in self._at.in_jobs(node).items()]
        return found


def _continue(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    os.close(pidfd)


@dataclass
class Report:
    """What one soak came to."""

    seed: int
    asked: int
    job: str = ""
    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    evidence: str = ""
    seconds: float = 0.0
    requeues: int = 0
    rounds: int = 0
    steps: int = 0
    steps_lost: int = 0
    """Repeated, in total."""

    def rows(self) -> list[dict[str, Any]]:
        """By kind, for faults that came alone: how many, how many of them ended no round, seconds to the next step."""
        sizes = Counter(fault.group for fault in self.faults)
        alone = [fault for fault in self.faults if sizes[fault.group] == 1]
        groups = {kind: [fault for fault in alone if fault.kind == kind] for kind in KINDS}
        groups["two at once"] = [fault for fault in self.faults if sizes[fault.group] > 1]
        rows = []
        for kind, faults in groups.items():
            times = [fault.next_step for fault in faults if fault.next_step is not None]
            if faults:
                row = {"kind": kind, "faults": len(faults), "no_restart": len(faults) - len(times)}
                rows.append(row | {"median": statistics.median(times or [0]), "max": max(times, default=0)})
        return rows

    def table(self) -> Table:
        made = Table(title="seconds from the fault to the next round's first step", title_justify="left")
        for name in ("fault", "survived", "trained on", "median", "max"):
            made.add_column(name, justify="left" if name == "fault" else "right")
        for row in self.rows():
            times = [f"{row[name]:.1f}" if row["faults"] > row["no_restart"] else "" for name in ("median", "max")]
            made.add_row(row["kind"], str(row["faults"]), str(row["no_restart"] or ""), *times)
        return made


def soak(
    at: Cluster,
    seed: int,
    faults: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    deadline: float = 240,
    keep: Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Inject ``faults`` faults in one job. What went wrong is in the report's ``problems``."""
    at.reset()
    folder = at.home / f"soak-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    report = Report(seed, faults)
    run = Soak(at, folder, deadline)
    report.job, report.faults = run.job, run.faults
    try:
        run.wait_until_it_trains()
        for group, drawn in enumerate(draws(seed, faults, kinds)):
            for made in run.inject(group, drawn):
                lasted = f" for {made.seconds:.1f} s" if made.seconds else ""
                then = f"trains after {made.next_step:.1f} s" if made.next_step else "trains on"
                number = run.faults.index(made) + 1
                say(
                    f"{number}/{faults} +{time.monotonic() - began:.0f} s: {made.kind} {','.join(made.nodes)}{lasted} "
                    f"({made.moment}): {then}, world of {run.steps()[-1]['world_size']}"
                )
        report.problems = run.finish()
        if report.problems:
            report.evidence = run.evidence()
    except (BenchmarkError, OSError) as error:
        report.problems.append(str(error))
        report.evidence = run.evidence()
    finally:
        run.undo_all()
        steps, events = run.steps(), run.events()
        report.seconds = time.monotonic() - began
        report.steps = max((step["step"] for step in steps), default=0)
        report.steps_lost = len(steps) - report.steps
        report.rounds = sum(event["event"] == "round" for event in events)
        report.requeues = max(0, sum(event["event"] == "start" for event in events) - 1)
        if keep:
            shutil.copytree(folder, keep / f"{run.job}-seed-{seed}", dirs_exist_ok=True, ignore=_NOT_KEPT)
        at.reset()
        shutil.rmtree(folder, ignore_errors=True)
    return report


_NOT_KEPT = shutil.ignore_patterns("secret", "checkpoint.*")


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"faults:": "", **KINDS},
        "soak.py --seed 7",
        "soak.py --faults 10 --kinds head-power head-cut --keep evidence",
    )
    add = parser.add_argument
    add("--faults", type=positive, default=30, metavar="N", help="how many (default: 30)")
    add("--seed", type=positive, default=1, metavar="S", help="of the chance that chooses them (default: 1)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    text = "after a fault, for the job to train again (default: 240)"
    add("--deadline", type=positive, default=240, metavar="SECONDS", help=text)
    add("--json", type=Path, metavar="FILE", help="write all faults, the summary and where it was measured")
    add("--keep", type=Path, metavar="DIR", help="copy the job's logs, events and steps there")
    add_state(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with cluster(args.state) as at:
            say = functools.partial(print, flush=True)
            report = soak(at, args.seed, args.faults, kinds=args.kinds, deadline=args.deadline, keep=args.keep, say=say)
    except (BenchmarkError, OSError) as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 1
    if args.json:
        rest = {"machine": machine(), "summary": report.rows(), **asdict(report)}
        args.json.write_text(json.dumps(rest, indent=1) + "\n")
    console.print(report.table())
    print(
        f"seed {report.seed}: {len(report.faults)} of {report.asked} faults in {report.seconds:.0f} s; "
        f"{report.rounds} rounds, {report.requeues} requeues, {report.steps} steps, {report.steps_lost} repeated"
    )
    if report.problems:
        print(report.evidence)
        print("\n".join(f"soak.py: {problem}" for problem in report.problems), file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
