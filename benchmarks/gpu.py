"""What only a GPU can show, in a few minutes on one: which backends of this torch can be reconfigured there, how much
memory a standby takes, and that workers on the GPU continue when one of them is killed.

Needs no Slurm and no root. Where torch is older than 2.14 the workers are restarted, and that is what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _cluster import wait_for
from _jobs import json_lines
from _processes import cpu_seconds, is_standby
from _report import ROOT, BenchmarkError, machine, parser_with, run_main, write_json

WORKERS = 3
STEPS = 20
"""Steps that every worker does before one worker is killed, and afterwards."""
DEADLINE, SHORT = 60.0, 30.0
"""Seconds to wait for a job, at most six times, and for each of four backends: eight minutes in all."""
STANDBY_IDLE = 3.0
"""Seconds without work after which a standby counts as ready."""
RECONFIGURE = """\
import sys, torch, torch.distributed as dist
backend, device = sys.argv[1:]
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, enable_reconfigure=True)
assert dist._supports_reconfigure(), "cannot be reconfigured"
for round in (1, 2):
    dist._reconfigure(uuid=round, handles=[dist._get_reconfigure_handle()]).wait()
    dist.all_reduce(torch.ones(1, device=device))
"""
"""A world of one, reconfigured twice."""


def reconfigures(backend: str, device: str) -> str:
    """``yes``, or the reason why this torch cannot reconfigure ``backend``."""
    command = [sys.executable, "-c", RECONFIGURE, backend, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SHORT, check=False)
    except subprocess.TimeoutExpired:
        return f"hangs: not done in {SHORT:g} s"
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    return "yes" if done.returncode == 0 else errors[-1] if errors else f"exit code {done.returncode}"


class Job:
    """Workers of one machine, all on the same device."""

    def __init__(self, folder: Path, device: str, preload: str) -> None:
        self._steps = folder / "steps.jsonl"
        script = [str(ROOT / "benchmarks" / "gpu_steps.py"), f"--folder={folder}", f"--device={device}"]
        options = [f"--local={WORKERS}", "--nproc-per-node=1", f"--log-dir={folder}", f"--preload={preload}"]
        command = [sys.executable, str(ROOT / "bin" / "elastic-srun"), *options, *script]
        self._output = folder / "output"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def workers(self, round: int | None = None) -> dict[int, int]:
        """Number of steps of each pid, in ``round`` or in total."""
        done: dict[int, int] = {}
        for step in json_lines(self._steps):
            if round in {None, step["round"]}:
                done[step["pid"]] = done.get(step["pid"], 0) + 1
        return done

    def first_step(self, after_round: int) -> dict[str, Any]:
        """The first step of a later round."""
        return min((s for s in json_lines(self._steps) if s["round"] > after_round), key=lambda step: step["time"])

    def round(self) -> int:
        return max((step["round"] for step in json_lines(self._steps)), default=0)

    def wait_until_it_trains(self, after_round: int = 0) -> None:
        def trains() -> bool | None:
            if self.process.poll() is not None:
                raise BenchmarkError("the job has ended")
            done = self.workers(self.round())
            return (self.round() > after_round and len(done) == WORKERS and min(done.values()) >= STEPS) or None

        try:
            wait_for(f"{STEPS} steps of {WORKERS} workers", trains, DEADLINE)
        except BenchmarkError as error:
            raise BenchmarkError(f"{error}\n{self._output.read_text()[-2000:]}") from None

    def standbys(self) -> list[int]:
        """The pids of the standbys, once they have been idle for a while."""
        idle_since, before = time.monotonic(), dict[int, float]()

        def idle() -> list[int] | None:
            nonlocal idle_since, before
            used = {pid: cpu_seconds(pid) for pid in descendants(self.process.pid) if is_standby(argv(pid))}
            if used != before or len(used) != WORKERS:
                idle_since, before = time.monotonic(), used
            return list(used) if time.monotonic() - idle_since > STANDBY_IDLE else None

        return wait_for("the standbys", idle, DEADLINE, every=0.2)


@contextmanager
def running(device: str, preload: str) -> Iterator[Job]:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), device, preload)
        try:
            yield job
        finally:
            job.process.terminate()
            job.process.send_signal(signal.SIGINT)  # kills the agents; SIGTERM again might not count
            job.process.wait()


def argv(pid: int) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def private_mib(pid: int) -> int:
    """Memory that ``pid`` shares with no other process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) // 1024


def gpu_mib(device: str) -> int | None:
    """GPU memory that is in use, by any process."""
    if device == "cpu":
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def measure(device: str, preload: str) -> dict[str, Any]:
    """One job: the memory that it takes, and what the kill of one of its workers costs."""
    idle = gpu_mib(device)
    with running(device, preload) as job:
        job.wait_until_it_trains()
        standbys = job.standbys() if preload != "off" else []
        before, round_ = job.workers(), job.round()
        found: dict[str, Any] = {
            "gpu_mib": None if idle is None else (gpu_mib(device) or 0) - idle,
            "worker_private_mib": [private_mib(pid) for pid in before],
            "standby_private_mib": [private_mib(pid) for pid in standbys],
        }
        victim, moment = list(before)[-1], time.time()
        os.kill(victim, signal.SIGKILL)
        job.wait_until_it_trains(after_round=round_)
        after = job.workers(job.round())
        return found | {
            "seconds_to_next_step": round(job.first_step(round_)["time"] - moment, 2),
            "processes_kept": len(before.keys() & after.keys()),
        }


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__, {}, "python benchmarks/gpu.py --json gpu.json", "python benchmarks/gpu.py --device cpu"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script itself")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    backends = ["gloo"] if args.device == "cpu" else ["gloo", "nccl", "nccl2", "cpu:gloo,cuda:nccl2"]
    report: dict[str, Any] = {"machine": machine(), "device": args.device}
    report["reconfigures"] = {backend: reconfigures(backend, args.device) for backend in backends}
    for preload in ("off", "auto"):
        report[f"preload_{preload}"] = measure(args.device, preload)
        write_json(args.json, report)
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
