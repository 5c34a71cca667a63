"""Processes as the kernel shows them, and what a process costs."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process as the kernel shows it. ``pid`` as this machine sees it."""

    pid: int
    argv: list[str]
    is_python: bool
    """False for srun and slurmstepd, whose command lines have the same words."""
    job: str | None
    """The Slurm job of the process."""


def processes(state: Path, node: str) -> list[Process]:
    """The processes on ``node`` of the mini-slurm in ``state``."""
    init = (state / "machines" / node).read_text().split()[0]
    found: list[Process] = []
    try:
        machine = os.readlink(f"/proc/{init}/ns/uts")
    except FileNotFoundError:
        return found  # the node has no power
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):  # the process has just ended
            if entry.name.isdecimal() and os.readlink(f"{entry.path}/ns/uts") == machine:
                argv = os.fsdecode(Path(entry.path, "cmdline").read_bytes()).split("\0")[:-1]
                environ = os.fsdecode(Path(entry.path, "environ").read_bytes()).split("\0")
                job = next((line.partition("=")[2] for line in environ if line.startswith("SLURM_JOB_ID=")), None)
                is_python = os.path.basename(os.readlink(f"{entry.path}/exe")).startswith("python")
                found.append(Process(int(entry.name), argv, is_python, job))
    return found


def is_standby(line: Sequence[str]) -> bool:
    """Whether ``line`` is the command line of a standby; that of a worker names its script."""
    return len(line) > 2 and os.path.basename(line[2]) == "standby.py"


def cpu_seconds(pid: int) -> float:
    """CPU time that ``pid`` has used; 0 if the process is gone."""
    fields = _stat(pid)
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def start_time(pid: int) -> float:
    """When the kernel started ``pid``, in seconds since the epoch, to a hundredth; infinity if the process is gone."""
    if not (fields := _stat(pid)):
        return float("inf")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of the process's stat file from the third on; [] if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


@dataclass(frozen=True)
class Ran:
    """A process that has ended. Times in seconds; ``cpu`` includes all children that the process waited for."""

    began: float
    wall: float
    cpu: float
    exit_code: int
    output: str


def run_timed(argv: Sequence[str], cwd: Path | None = None) -> Ran:
    """Run ``argv`` to its end, without standard input."""
    with tempfile.TemporaryFile() as output:
        began, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=cwd)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - clock
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ran(began, wall, used.ru_utime + used.ru_stime, process.returncode, text)


def import_times(output: str) -> dict[str, float]:
    """Packages outside the standard library in the output of ``-X importtime``, with the milliseconds of each package
    alone, longest first.
    """
    took: dict[str, float] = {}
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", output, re.MULTILINE):
        package = module.partition(".")[0]
        if package not in sys.stdlib_module_names:
            took[package] = took.get(package, 0.0) + int(own) / 1000
    return dict(sorted(took.items(), key=lambda item: -item[1]))
