"""``elastic-sbatch --resume`` continues a job that has ended."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import COUNTS, Cluster, Job
from on_demand import ON_DEMAND

SBATCH, HPC = (str(Path(sys.executable).with_name(name)) for name in ("elastic-sbatch", "elastic-hpc"))


def refusal(cluster: Cluster, folder: Path, *words: str) -> str:
    done = cluster.exec([SBATCH, *words], cwd=folder, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def test_a_cancelled_job_continues_from_its_last_checkpoint(
    fresh: Cluster, folder: Path, submit: Callable[..., Job]
) -> None:
    (folder / "hold").touch()
    job = submit("--nodes=1:2", "--max-restarts=3", "--comment=first", script=COUNTS)
    job.wait_steps(25)
    assert f"job {job.id} is RUNNING: it has not ended" in refusal(fresh, folder, f"--resume={job.id}")
    fresh.exec(["scancel", job.id])
    job.wait_state("CANCELLED")
    done_before = job.steps()[-1]["step"]

    done = fresh.exec([SBATCH, "--resume", str(job.run_dir), "--comment=second"], cwd=fresh.home)
    new = Job(fresh, done.stdout.split()[-1], folder)
    assert f"job {job.id} continues in its run directory, with its record and its counters" in done.stderr
    assert f"--comment as given now; all other options are those of job {job.id}'s submission" in done.stderr
    assert fresh.job_field(new.id, "Comment") == "second"
    job.wait_steps(25, round=2)
    (status,) = json.loads(fresh.exec([HPC, "status", "--json", new.id], cwd=folder).stdout)["jobs"]
    assert (status["id"], status["slurm_id"], status["state"], status["runs"]) == (job.id, new.id, "RUNNING", 2)
    (folder / "hold").unlink()
    assert new.wait_state("COMPLETED", "FAILED") == "COMPLETED"
    assert job.verdict()["outcome"] == "finished"
    job.assert_steps_contiguous(10)
    first = next(step for step in job.steps() if step["round"] == 2)
    assert 20 < first["step"] <= done_before + 1
    assert new.run_dir.resolve() == job.run_dir.resolve()
    assert [start["job"] for start in job.events("start")] == [job.id, new.id]
    assert f"job {job.id} has finished; to continue the training" in refusal(fresh, folder, f"--resume={new.id}")


@ON_DEMAND
def test_a_job_whose_restarts_are_used_up_gets_new_restarts_and_keeps_its_counters(
    fresh: Cluster, folder: Path, submit: Callable[..., Job]
) -> None:
    (folder / "hold").touch()
    told = folder / "told"
    job = submit("--nodes=1", "--max-restarts=0", f"--notify=tee -a {told}", script=COUNTS)
    job.wait_steps(15)
    (worker,) = fresh.running("counts.py", "n1")
    os.kill(worker, signal.SIGKILL)
    job.wait_state("FAILED")
    assert told.read_text().startswith(f"job {job.id} (counts.py) has failed: ")
    assert f"elastic-sbatch --resume {job.id}" in fresh.exec([HPC, "why", job.id], cwd=folder).stdout
    new = Job(
        fresh,
        fresh.exec([SBATCH, "--parsable", "--resume", job.id, "--max-restarts=1"], cwd=folder).stdout.strip(),
        folder,
    )
    job.wait_steps(15, round=2)
    (folder / "hold").unlink()
    assert new.wait_state("COMPLETED", "FAILED") == "COMPLETED"
    job.assert_steps_contiguous(10)


@ON_DEMAND
@pytest.mark.parametrize("copied", [True, False])
def test_a_job_keeps_its_copy_of_the_code_unless_the_user_requests_a_new_one(
    fresh: Cluster, folder: Path, submit: Callable[..., Job], *, copied: bool
) -> None:
    script = folder / "train.py"
    fresh.exec(["cp", COUNTS, str(script)])
    fresh.exec(["git", "init", "-q"], cwd=folder)
    fresh.exec(["git", "add", "train.py"], cwd=folder)
    logs = folder / "elastic-logs"
    job = submit("--nodes=1", "--snapshot", script="train.py", args=["one"])
    job.wait_event("round")
    fresh.exec(["scancel", job.id])
    job.wait_state("CANCELLED")
    saved = job.run_dir / "code" / "checkpoints" / "step-9"
    fresh.exec(["mkdir", "-p", str(saved)])  # by a path that is relative to the script's working directory
    fresh.exec(["sh", "-c", "echo 'print(\"the new code\", flush=True)' >> train.py"], cwd=folder)
    options = ["--snapshot"] if copied else []
    new = Job(
        fresh, fresh.exec([SBATCH, "--parsable", "--resume", job.id, *options], cwd=folder).stdout.strip(), folder
    )
    assert new.wait_state("COMPLETED", "FAILED") == "COMPLETED"
    assert ("the new code" in job.worker_output()) == copied
    assert fresh.seen_from_login(saved).is_dir()
    assert not list(logs.glob(".submission.*"))
