"""A mini-slurm for the benchmarks and the tests, and what runs on its nodes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from _processes import processes
from _report import ROOT, BenchmarkError

MINI_SLURM = ROOT / "bin" / "mini-slurm"
_POLL = 0.02  # seconds between two polls; no measured time depends on the moment of a poll

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], seconds: float, *, every: float = _POLL) -> T:
    """The first answer of ``look`` that is not None. Raises BenchmarkError after ``seconds``."""
    end = time.monotonic() + seconds
    while (answer := look()) is None:
        if time.monotonic() > end:
            raise BenchmarkError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(every)
    return answer


class Cluster:
    """A running mini-slurm. ``run`` acts as its unprivileged user on the login machine, ``mini`` calls the tool."""

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
        chdir = ["env", f"--chdir={cwd}"] if cwd else []
        return _mini(self._state, "exec", "--", *chdir, *argv, check=check).stdout

    def processes(self, node: str) -> dict[int, list[str]]:
        """Command lines of the Python processes on ``node``, by pid as this machine sees it."""
        return {process.pid: process.argv for process in processes(self._state, node) if process.is_python}

    def in_jobs(self, node: str) -> dict[int, list[str]]:
        """Command lines of the processes of jobs on ``node``, by pid."""
        return {process.pid: process.argv for process in processes(self._state, node) if process.job}

    def pids(self, node: str, *words: str, but: Sequence[str] = ()) -> list[int]:
        """Processes on ``node`` whose command line has all ``words`` and none of the words in ``but``."""
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
        return _slurm_version(self._state)


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
        output = (done.stdout + done.stderr).strip()
        raise BenchmarkError(f"mini-slurm {' '.join(args)}: exit code {done.returncode}: {output}")
    return done


def reset(state: Path) -> None:
    """End all jobs, bring all nodes back. Raises BenchmarkError if that takes more than two minutes."""

    def is_new() -> bool | None:
        status = json.loads(_mini(state, "status", "--json").stdout)
        if status["jobs"]:
            _mini(state, "exec", "--", "scancel", "--user", "minislurm", check=False)
        for node, facts in status["nodes"].items():
            works = facts["power"] and facts["links"] and facts["slurmd"]
            if not works or re.search("DOWN|FAIL|DRAIN", facts["slurm"]):
                _mini(state, "heal", node)
        return (not status["jobs"] and all(facts["slurm"] == "IDLE" for facts in status["nodes"].values())) or None

    wait_for("an empty queue and idle nodes", is_new, 120, every=0.5)
    if _slurm_version(state).startswith("22.05"):
        # until it is reconfigured, Slurm 22.05 does not notice that jobs may share a node that has left an exclusive
        # job; jobs that could start with fewer nodes would start without that node
        _mini(state, "exec", "--root", "--", "scontrol", "reconfigure")
        wait_for("idle nodes", is_new, 120)


@functools.cache
def _slurm_version(state: Path) -> str:
    return _mini(state, "exec", "--", "sbatch", "--version").stdout.split()[-1]


def slurmctld(state: Path, what: Literal["stop", "start"]) -> None:
    """Stop slurmctld as a service manager does, or start it. It is not ready yet when this returns."""
    pid, conf = state / "run" / "slurmctld-login.pid", state / "etc" / "slurm" / "slurm.conf"
    script = {
        "stop": 'pid=$(cat "$1") && kill "$pid" && while kill -0 "$pid"; do sleep 0.05; done',
        "start": 'slurmctld -f "$2"',
    }[what]
    _mini(state, "exec", "--root", "--", "sh", "-c", f"({script}) >/dev/null 2>&1", "sh", str(pid), str(conf))
