"""Workers that are silent because they are suspended or busy raise no alarm, and the training continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND
from test_doctor_site import HPC

SCRIPT = """
import os, time
import torch
import torch.distributed as dist
from elastic_hpc.training import report_progress
dist.init_process_group("gloo")
run, step, enough = os.environ["ELASTIC_HPC_RUN_DIR"], 0, torch.zeros(1)
while not enough:
    step += 1
    enough[0] = os.path.exists(f"{run}/enough")
    dist.all_reduce(enough)
    report_progress(step)
    time.sleep(0.1)
    if dist.get_rank() == 0:
        with open(f"{run}/steps.new", "w") as file:
            file.write(f"{step}\\n")
        os.replace(f"{run}/steps.new", f"{run}/steps")  # a suspension must not find the file empty
"""

SILENT = """
import os, sys, time
import torch.distributed as dist
from elastic_hpc.training import report_progress
dist.init_process_group("gloo")
def train(first, last):
    for step in range(first, last):
        dist.barrier()
        report_progress(step)
        time.sleep(0.1)
train(0, 300)
until = time.monotonic() + {silence}
with open(os.environ["ELASTIC_HPC_RUN_DIR"] + "/checkpoint", "wb", buffering=0) as file:
    while dist.get_rank() == 0 and time.monotonic() < until:
        {what}
train(300, 350)
"""
SILENCE = 340
"""Seconds: more than the five minutes after which idle workers count as hanging."""
EVALUATES = "sum(range(100_000))"
SAVES = "file.seek(0); file.write(bytes(2**21)); time.sleep(1)"


@ON_DEMAND
def test_a_long_evaluation_and_a_slow_checkpoint_of_one_rank_raise_no_alarm(
    submit: Callable[..., Job], folder: Path
) -> None:
    jobs = []
    for name, what in (("evaluates", EVALUATES), ("saves", SAVES)):
        script = folder / f"{name}.py"
        script.write_text(SILENT.format(silence=SILENCE, what=what))
        jobs.append(submit("--nodes", "2", script=script))
    for job in jobs:
        assert job.wait_state("COMPLETED", "FAILED", deadline=SILENCE + 240) == "COMPLETED", job.output()
        assert 300 in [event["seconds"] for event in job.events("hang_timeout")]
        assert (job.events("failure"), len(job.events("round"))) == ([], 1)


@ON_DEMAND
def test_a_job_that_is_suspended_for_longer_than_the_hang_timeout_continues_without_an_alarm(
    submit: Callable[..., Job], fresh: Cluster, folder: Path
) -> None:
    script = folder / "steps.py"
    script.write_text(SCRIPT)
    job = submit("--nodes", "2", "--hang-timeout", "15", script=script)

    def step() -> int:
        path = fresh.seen_from_login(job.run_dir / "steps")
        return int(path.read_text().strip() or 0) if path.exists() else 0

    wait_for("some steps", lambda: step() > 20, 240)
    fresh.mini("exec", "--root", "--", "scontrol", "suspend", job.id)
    before = wait_for("the workers to stand still", lambda: _still(step))
    refused = fresh.exec([HPC, "resize", job.id, "1:2"], cwd=folder, check=False)
    assert f"job {job.id} is SUSPENDED, and has no agent that could answer: try again" in refused.stderr
    time.sleep(30)  # the suspension itself: only its length shows how long it lasted
    assert step() == before
    fresh.mini("exec", "--root", "--", "scontrol", "resume", job.id)
    wait_for("further steps", lambda: step() > before + 20)
    wait_for("the time in which an alarm would come", lambda: step() > before + 150)
    fresh.exec(["touch", str(job.run_dir / "enough")])
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.output()
    assert [event["kind"] for event in job.events("failure")] == []


def _still(step: Callable[[], int]) -> int:
    before = step()
    time.sleep(1.5)
    return before if before == step() else 0
