"""What the benchmarks share: a mini-slurm and a job on it, waiting with a deadline, how figures are written."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

ROOT = Path(__file__).resolve().parents[1]
MINI_SLURM = ROOT / "bin" / "mini-slurm"
_DEFAULT_STATE = os.environ.get("MINI_SLURM_STATE", "/var/lib/mini-slurm-benchmarks")
_POLL = 0.02  # seconds between two looks; no measured time comes from when we looked

FT, FT_MODULE = "ft_launcher", "nvidia_resiliency_ext.fault_tolerance.launcher"

T = TypeVar("T")


class BenchmarkError(Exception):
    """A run that says nothing about the launchers: the message goes to the user as it is."""


def wait_for(what: str, look: Callable[[], T | None], seconds: float, *, every: float = _POLL) -> T:
    """The first answer of ``look`` that is not None. BenchmarkError after ``seconds``."""
    end = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > end:
            raise BenchmarkError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(every)
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in ``path``, one a line; without the last line while it is being written, [] without a file."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # two writers of one file, as torchrun's attempts may be
            found.append(json.loads(line))
    return found


def wrong_steps(steps: Sequence[dict[str, Any]], checkpoint_every: int) -> list[str]:
    """Where the training of examples/train_digits.py did not go as it must: every round goes on right after a
    checkpoint, never skips or repeats a step of its own, and writes nothing once a later round does.
    """
    wrong = [] if steps and steps[0]["step"] == 1 else ["the first step is missing"]
    for before, after in pairwise(steps):
        done = after["step"] - 1
        if before["round"] == after["round"]:
            right = done == before["step"]
        else:
            right = before["round"] < after["round"] and done % checkpoint_every == 0
            right = right and before["step"] - checkpoint_every <= done <= before["step"]
        if not right:
            wrong.append(f"step {after} after {before}")
    return wrong


@dataclass(frozen=True)
class Process:
    """What the kernel says of a process; a text in a path says nothing. ``pid`` as this machine sees it."""

    pid: int
    argv: list[str]
    is_python: bool
    """Not srun or slurmstepd, which carry the same words."""
    job: str | None
    """The Slurm job for which it runs."""


def processes(state: Path, node: str) -> list[Process]:
    """What runs on ``node`` of the mini-slurm in ``state``."""
    init = (state / "machines" / node).read_text().split()[0]
    found: list[Process] = []
    try:
        machine = os.readlink(f"/proc/{init}/ns/uts")
    except FileNotFoundError:
        return found  # without power
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):  # it has just ended
            if entry.name.isdecimal() and os.readlink(f"{entry.path}/ns/uts") == machine:
                argv = os.fsdecode(Path(entry.path, "cmdline").read_bytes()).split("\0")[:-1]
                environ = os.fsdecode(Path(entry.path, "environ").read_bytes()).split("\0")
                job = next((line.partition("=")[2] for line in environ if line.startswith("SLURM_JOB_ID=")), None)
                is_python = os.path.basename(os.readlink(f"{entry.path}/exe")).startswith("python")
                found.append(Process(int(entry.name), argv, is_python, job))
    return found


class Cluster:
    """A mini-slurm that is up. ``run`` is the unprivileged user on its login machine, ``mini`` the tool itself."""

    def __init__(self, state: Path) -> None:
        self._state = state
        status = json.loads(self.mini("status", "--json"))
        self.home = Path(status["home"])
        self.nodes: tuple[str, ...] = tuple(status["nodes"])

    def mini(self, *args: str) -> str:
        return _mini(self._state, *args).stdout

    def start(self, *args: str) -> subprocess.Popen[str]:
        """``mini`` in the background."""
        command = [str(MINI_SLURM), "--state", str(self._state), *args]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *argv: str, cwd: Path | None = None, check: bool = True) -> str:
        there = ["env", f"--chdir={cwd}"] if cwd else []
        return _mini(self._state, "exec", "--", *there, *argv, check=check).stdout

    def expect_node(self, name: str) -> None:
        """BenchmarkError unless ``name`` is a node, and not the head."""
        if name not in self.nodes[1:]:
            raise BenchmarkError(f"--node {name!r}: expected one of {', '.join(self.nodes[1:])}, not the head")

    def processes(self, node: str) -> dict[int, list[str]]:
        """Command lines of the Python processes on ``node``, by pid as this machine sees it."""
        return {each.pid: each.argv for each in processes(self._state, node) if each.is_python}

    def in_jobs(self, node: str) -> dict[int, list[str]]:
        """Command lines of what runs on ``node`` for a job, by pid."""
        return {each.pid: each.argv for each in processes(self._state, node) if each.job}

    def pids(self, node: str, *words: str, but: Sequence[str] = ()) -> list[int]:
        """Processes on ``node`` whose command line has all ``words`` and none of ``but``."""
        lines = self.processes(node).items()
        return [pid for pid, line in lines if set(line).issuperset(words) and set(line).isdisjoint(but)]

    def slurmctld(self, what: Literal["stop", "start"]) -> None:
        slurmctld(self._state, what)

    def job_state(self, job: str) -> str:
        """Slurm's word for the state of ``job``; "" when Slurm has forgotten it."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}", check=False).strip()

    def started(self, job: str) -> int:
        """When ``job`` last started to run, in whole seconds since the epoch."""
        shown = self.run("env", "SLURM_TIME_FORMAT=%s", "scontrol", "show", "job", "--oneliner", job)
        return int(shown.partition(" StartTime=")[2].split()[0])

    def reset(self) -> None:
        reset(self._state)

    def slurm_version(self) -> str:
        return self.run("sbatch", "--version").split()[-1]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement. Times in seconds."""

    rung: str
    launcher: str
    outcome: str
    """stuck: the job ran on, no step of the new world in ``waited``; ended: the job left the queue after ``waited``;
    any other word: it went well.
    """
    waited: float
    total: float | None = None
    round: float | None = None
    """Decision to the new round: workers stopped, world formed. Only of ours, as ``start``."""
    start: float | None = None
    """Round to the end of its first step: interpreter, imports, process group, checkpoint, one step."""
    busy_before: float = 0.0
    """Share of the machine that others used just before the job was submitted, 0 to 1."""
    load_average: float = 0.0
    """Of one minute, when the change began: our own workers are in it."""
    job: str = ""


class Job:
    """One job in a folder of its own, submitted by elastic-sbatch, and what it writes there."""

    def __init__(self, at: Cluster, folder: Path, steps: Path, *argv: str) -> None:
        """``steps``: where the script records its steps. ``argv``: options, script, arguments."""
        self.at = at
        self.folder = folder
        self._steps = steps
        at.run("mkdir", "-p", str(folder))
        self.id = self.submit(*argv)

    def submit(self, *argv: str) -> str:
        """Its id."""
        return self.elastic_sbatch("--parsable", *argv).strip()

    def elastic_sbatch(self, *argv: str) -> str:
        """What it says."""
        return self.at.run(str(Path(sys.executable).with_name("elastic-sbatch")), *argv, cwd=self.folder)

    def steps(self) -> list[dict[str, Any]]:
        return json_lines(self._steps)

    def events(self) -> list[dict[str, Any]]:
        return json_lines(self.folder / "elastic-logs" / self.id / "events.jsonl")

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("slurm-*.out")))

    def watch(self, look: Callable[[], T | None], since: float, seconds: float) -> tuple[T | None, dict[str, Any]]:
        """What ``look`` finds within ``seconds`` of ``since``, and what a ``Run`` says of that. It goes on looking
        until then, unless the job leaves the queue.
        """
        load, asked, outcome, found = os.getloadavg()[0], 0.0, "stuck", None
        while (waited := time.time() - since) < seconds and (found := look()) is None:
            if waited - asked > 2:
                asked = waited
                if self.at.job_state(self.id) not in {"RUNNING", "COMPLETING", "PENDING", "REQUEUED"}:
                    outcome = "ended"
                    break
            time.sleep(0.05)
        return found, {"outcome": outcome, "waited": waited, "load_average": load, "job": self.id}

    def wait_for_steps(self, look: Callable[[], T | None], seconds: float) -> T:
        """``wait_for`` the first steps; the error tells what the job has said."""
        try:
            return wait_for("the first steps", look, seconds)
        except BenchmarkError as error:
            raise BenchmarkError(f"job {self.id}: {error}\n{self.output()[-2000:]}") from None

    def clear(self, keep: Path | None) -> None:
        """End it and all others; leave what it wrote in ``keep`` alone."""
        self.at.run("scancel", self.id, check=False)
        if keep:
            to = keep / f"{self.id}-{self.folder.name}"
            shutil.copytree(self.folder, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("secret"))
        self.at.reset()
        shutil.rmtree(self.folder, ignore_errors=True)


def launcher_template(at: Cluster, name: str, module: str, *options: str) -> str:
    """The option for elastic-sbatch that has ``module`` run with ``options`` and those of torchrun, in its place."""
    words = json.dumps([module, *options])
    template = at.home / f"{name}.sbatch.j2"
    template.write_text(
        "#!/bin/bash\n"
        '{% include "directives.j2" %}\n'
        '{% include "prepare.j2" %}\n'
        f"srun {{{{ srun_options|quote_all }}}} \\\n"
        f"  {{{{ (torchrun_command[:3] + {words} + torchrun_command[4:])|quote_all }}}}\n"
    )
    return f"--template={template}"


def install_ft_launcher(at: Cluster, *options: str) -> list[str]:
    """NVIDIA's launcher, in a folder of the cluster's user; the answer is how to submit with it, and ``options``."""
    folder = at.home / FT
    packages = ["nvidia-resiliency-ext", "psutil", "defusedxml", "nvidia-ml-py", "pyyaml"]  # not torch, it is there
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", f"--target={folder}"]
    done = subprocess.run([*install, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise BenchmarkError(f"{FT} does not install here: {why}; leave it out: --launchers")
    at.run("env", f"PYTHONPATH={folder}", sys.executable, "-c", f"import {FT_MODULE}")
    template = launcher_template(at, FT, FT_MODULE, "--ignore-missing-fault-tol-cfg", *options)
    return [template, f"--env=PYTHONPATH={folder}", "--env=GLOO_SOCKET_IFNAME=eth0", "--env=OMP_NUM_THREADS=1"]


def installed(folder: Path, package: str) -> str:
    """The version of what pip has installed into ``folder``, "" if it is not there."""
    found = sorted(folder.glob(f"{package.replace('-', '_')}-*.dist-info"))
    return found[0].name.split("-")[1].removesuffix(".dist") if found else ""


@contextlib.contextmanager
def cluster(state: Path) -> Iterator[Cluster]:
    """The cluster in ``state``; started, and taken down at the end, unless it was up."""
    if os.geteuid() != 0:
        raise BenchmarkError(f"mini-slurm needs root: type  sudo {sys.executable} {' '.join(sys.argv)}")
    was_up = _mini(state, "status", check=False).returncode == 0
    if not was_up:
        _mini(state, "down")
        _mini(state, "up")
    try:
        yield Cluster(state)
    finally:
        if not was_up:
            _mini(state, "down")


def _mini(state: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(MINI_SLURM), "--state", str(state), *args]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=400, check=False)
    if check and done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise BenchmarkError(f"mini-slurm {' '.join(args)}: exit code {done.returncode}: {said}")
    return done


def reset(state: Path) -> None:
    """End all jobs, bring all nodes back. BenchmarkError if that takes more than two minutes."""

    def is_new() -> bool | None:
        status = json.loads(_mini(state, "status", "--json").stdout)
        if status["jobs"]:
            _mini(state, "exec", "--", "scancel", "--user", "minislurm", check=False)
        for node, seen in status["nodes"].items():
            works = seen["power"] and seen["links"] and seen["slurmd"]
            if not works or re.search("DOWN|FAIL|DRAIN", seen["slurm"]):
                _mini(state, "heal", node)
        return (not status["jobs"] and all(seen["slurm"] == "IDLE" for seen in status["nodes"].values())) or None

    wait_for("an empty queue and idle nodes", is_new, 120, every=0.5)


def slurmctld(state: Path, what: Literal["stop", "start"]) -> None:
    """Stop it as a service manager does, or start it; it is not ready when this returns."""
    pid, conf = state / "run" / "slurmctld-login.pid", state / "etc" / "slurm" / "slurm.conf"
    script = {
        "stop": 'pid=$(cat "$1") && kill "$pid" && while kill -0 "$pid"; do sleep 0.05; done',
        "start": 'slurmctld -f "$2"',
    }[what]
    _mini(state, "exec", "--root", "--", "sh", "-c", f"({script}) >/dev/null 2>&1", "sh", str(pid), str(conf))


def machine() -> dict[str, Any]:
    """Where this is measured: a figure without it means nothing."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "elastic_hpc": version("elastic_hpc"),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
    }


def busy(seconds: float = 1.0) -> float:
    """How much of this machine works during the next ``seconds``, 0 to 1: others' share while nothing of ours runs."""

    def ticks() -> tuple[int, int]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle and waiting for a disk

    total, idle = ticks()
    time.sleep(seconds)
    later_total, later_idle = ticks()
    return 1 - (later_idle - idle) / max(1, later_total - total)


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and most of those that are known."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def spread_text(found: dict[str, float] | None, digits: int) -> str:
    if not found:
        return "-"
    median, least, most = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def origin(where: dict[str, Any], runs: Sequence[Run]) -> str:
    """Where and at what load it was measured, in one line; ``where`` is from ``machine``."""
    others, loads = [run.busy_before for run in runs], [run.load_average for run in runs]
    return (
        f"{where['date']}: torch {where['torch']}, Slurm {where['slurm']}, Python {where['python']}, "
        f"{where['cores']} cores; others used {min(others):.0%} to {max(others):.0%} of them before the runs, "
        f"load at the fault {min(loads):.1f} to {max(loads):.1f}"
    )


def cpu_seconds(pid: int) -> float:
    """What ``pid`` has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def import_times(said: str) -> dict[str, float]:
    """Packages outside the standard library in what ``-X importtime`` printed, with the milliseconds that each took
    itself, longest first.
    """
    took: dict[str, float] = {}
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", said, re.MULTILINE):
        package = module.partition(".")[0]
        if package not in sys.stdlib_module_names:
            took[package] = took.get(package, 0.0) + int(own) / 1000
    return dict(sorted(took.items(), key=lambda item: -item[1]))


def figure(
    name: str, ours: float | None, peer: str, theirs: float | None, *, unit: str = "s", note: str = ""
) -> dict[str, Any]:
    """A line of run.py's table. ``theirs``: None if there is none, ``note`` says why."""
    ratio = theirs / ours if ours and theirs is not None else None
    return {"name": name, "ours": ours, "peer": peer, "theirs": theirs, "ratio": ratio, "unit": unit, "note": note}


@contextlib.contextmanager
def kept(runs: Sequence[object]) -> Iterator[None]:
    """Errors and Ctrl-C end the block, are told, and leave what was measured in ``runs`` to be shown."""
    program = os.path.basename(sys.argv[0])
    try:
        yield
    except (BenchmarkError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{program}: stopped after {len(runs)} runs", file=sys.stderr)


def can_write(path: Path | None) -> bool:
    """Whether ``--json`` names a file in a folder that exists; tells the user if not."""
    if path and not path.parent.is_dir():
        program = os.path.basename(sys.argv[0])
        print(f"{program}: --json {str(path)!r}: expected a file in a folder that exists", file=sys.stderr)
        return False
    return True


def parser_with(doc: str | None, names: dict[str, str], *examples: str) -> argparse.ArgumentParser:
    """A parser whose help explains ``names``, under headings that are names without a text, and shows ``examples``."""
    width = max(map(len, names)) + 2
    lines = [f"  {name:<{width}}{text}" if text else name for name, text in names.items()]
    return argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join([*lines, "", "examples:", *(f"  sudo benchmarks/{example}" for example in examples)]),
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options for what is left of the runs."""
    text = "write all runs, the summary and where it was measured"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy each job's logs and steps there")


def add_state(parser: argparse.ArgumentParser) -> None:
    """The option for ``cluster``'s directory."""
    text = "mini-slurm's directory; one that is up is used and left up (default: $MINI_SLURM_STATE or %(default)s)"
    parser.add_argument("--state", type=Path, default=_DEFAULT_STATE, metavar="DIR", help=text)


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0, for example 3")
