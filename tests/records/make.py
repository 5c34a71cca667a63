#!/usr/bin/env python3
"""Remake the records of this folder, as root: runs jobs on a real Slurm, with real faults. Takes five minutes.

The folders are the jobs' run directories at their end, without secrets, large files and details of this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "slurm"))
from conftest import Cluster, Job, wait_for  # noqa: E402

STATE = Path("/var/lib/mini-slurm-records")
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


class Stage:
    """The cluster, and for each job a folder with the script."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def submit(self, name: str, *options: str, steps: int = 400, script: str = "train.py") -> Job:
        folder = self.cluster.home / name
        self.cluster.exec(["mkdir", "-p", str(folder)])
        shutil.copy(HERE / script, folder) if (HERE / script).exists() else (folder / script).write_text(BROKEN)
        argv = [str(Path(sys.executable).with_name("elastic-sbatch")), "--parsable", "--time", "30", *options]
        done = self.cluster.exec([*argv, str(folder / script), str(steps)], cwd=folder)
        return Job(self.cluster, done.stdout.strip(), folder)

    def wait_step(self, job: Job, step: int) -> None:
        wait_for(f"step {step}", lambda: f"step {step}\n" in job.worker_output())

    def elastic_hpc(self, *argv: str) -> None:
        self.cluster.exec([str(Path(sys.executable).with_name("elastic-hpc")), *argv])


BROKEN = """\
def load(path):
    raise FileNotFoundError(2, "No such file or directory", path)


load("data/train.bin")
"""


def faults(stage: Stage) -> Job:
    """A worker fails, a node loses its power, the job is warned before its time limit, is requeued, and finishes."""
    job = stage.submit("faults", "--nodes", "2:4", "--grace", "10")
    stage.wait_step(job, 60)
    stage.cluster.exec(["touch", str(job.folder / "fail")])
    job.wait_event("round", 2)
    stage.wait_step(job, 140)
    stage.cluster.mini("kill", "n3")
    job.wait_event("round", 3)
    stage.wait_step(job, 240)
    stage.cluster.mini("heal", "n3")
    stage.cluster.exec(["scancel", "--batch", "--signal=URG", job.id])
    return job


def head(stage: Stage) -> Job:
    """The first node loses its power, and another node takes over the lead."""
    job = stage.submit("head", "--nodes", "2:4", steps=240)
    stage.wait_step(job, 60)
    stage.cluster.mini("kill", "n1")
    return job


def grown(stage: Stage) -> Job:
    """Starts on two nodes, as the others are busy; joiners come, and one of them loses its power."""
    busy = stage.cluster.exec(
        ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--nodelist=n[3-4]", "--wrap=srun sleep 600"],
        cwd=stage.cluster.home,
    ).stdout.strip()
    wait_for("the other job", lambda: "RUNNING" in stage.cluster.exec(["squeue", "--format=%T"]).stdout)
    job = stage.submit("grown", "--nodes", "2:4", "--grow", "--grow-every", "1", "--cpus-per-task", "1")
    stage.wait_step(job, 40)
    stage.cluster.exec(["scancel", busy])
    wait_for("four nodes", lambda: any(len(event["nodes"]) == 4 for event in job.events("round")))
    count = len(job.events("round"))
    time.sleep(5)  # so that the records have some content
    stage.cluster.mini("kill", job.events("round")[-1]["nodes"][-1])
    job.wait_event("round", count + 1)
    return job


def broken(stage: Stage) -> Job:
    """The script cannot run and fails in the same way twice."""
    return stage.submit("broken", "--nodes", "2", script="broken.py")


def cancelled(stage: Stage) -> Job:
    """The user cancels the job with scancel."""
    job = stage.submit("cancelled", "--nodes", "2:4")
    stage.wait_step(job, 40)
    stage.cluster.exec(["scancel", job.id])
    return job


def keep(job: Job, name: str, home: str) -> None:
    target = HERE / name
    shutil.rmtree(target, ignore_errors=True)
    hidden = shutil.ignore_patterns("secret", "checkpoints", "script.sbatch", "code*", ".*", "over", "*.error.json")
    shutil.copytree(job.run_dir, target, ignore=hidden)
    for path in target.rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace(home, "/home/user").replace(str(ROOT), "/home/user/elastic_hpc"))
            path.chmod(0o644)
        else:
            path.chmod(0o755)


def main() -> None:
    os.environ["MINI_SLURM_STATE"] = str(STATE)
    cluster = Cluster(STATE)
    cluster.mini("up", timeout=400)
    try:
        made: list[Callable[[Stage], Job]] = [faults, head, grown, broken, cancelled]
        for make in made:
            if len(sys.argv) > 1 and make.__name__ not in sys.argv[1:]:
                continue
            print(make.__name__, flush=True)
            job = make(Stage(cluster))
            print(job.id, job.wait_state(*ENDED, deadline=300), flush=True)
            keep(job, make.__name__, str(cluster.home))
            cluster.reset()
    finally:
        cluster.mini("down")


if __name__ == "__main__":
    main()
