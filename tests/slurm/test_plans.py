"""``elastic-hpc plan`` on a busy cluster, compared with what then happens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND

PLAN = [str(Path(sys.executable).with_name("elastic-hpc")), "plan", "--json"]


def busy(cluster: Cluster, nodes: int, minutes: int) -> str:
    """Another user's job, which ends at its time limit."""
    options = ["--exclusive", f"--nodes={nodes}", f"--time={minutes}", "--output=/dev/null", "--parsable"]
    job = cluster.exec(["sbatch", *options, "--wrap=exec sleep 9000"]).stdout.strip()
    wait_for(f"job {job} to run", lambda: cluster.job_field(job, "JobState") == "RUNNING")
    return job


def plan(cluster: Cluster, folder: Path, *options: str) -> dict[str, Any]:
    (folder / "train.py").write_text("import time; time.sleep(600)\n")
    found: dict[str, Any] = json.loads(cluster.exec([*PLAN, *options, "train.py"], cwd=folder).stdout)
    return found


def status(cluster: Cluster, job: Job) -> dict[str, Any]:
    shown = cluster.exec([*PLAN[:1], "status", "--json", job.id], cwd=job.folder).stdout
    found: dict[str, Any] = json.loads(shown)["jobs"][0]
    return found


def test_the_plan_shows_which_sizes_start_immediately_and_which_start_when_running_jobs_end(
    fresh: Cluster, folder: Path
) -> None:
    busy(fresh, 2, 5)
    busy(fresh, 1, 20)
    found = plan(fresh, folder, "--nodes=1:5", "--exclusive", "--time=5", "--work=30m")
    starts = {row["nodes"]: (row["starts_in"], row["starts_with"]) for row in found["rows"]}
    assert starts["1:5"][0] < 10
    assert starts["1:5"][1] == 1
    for size, (minutes, nodes) in {"2:5": (5, 3), "3:5": (5, 3), "4:5": (20, 4)}.items():
        assert 60 * minutes - 45 < starts[size][0] < 60 * minutes + 5
        assert starts[size][1] == nodes
    assert starts["5:5"] == (None, 0)
    assert found["rows"][4]["refused"] == "Requested node configuration is not available"
    assert found["ask_for"] == "--nodes 1:5 --grow"
    jobs = fresh.exec(["squeue", "--noheader", "--states=all", "--name=train", "--format=%i"]).stdout
    assert jobs == ""


@ON_DEMAND
def test_a_job_starts_at_the_time_and_size_that_the_plan_has_shown(
    fresh: Cluster, folder: Path, submit: Callable[..., Job]
) -> None:
    busy(fresh, 3, 1)
    found = plan(fresh, folder, "--nodes=2:4", "--exclusive", "--time=5")
    planned = time.time() + found["rows"][0]["starts_in"]
    assert found["rows"][0]["starts_with"] == 4
    job = submit("--nodes=2:4", "--exclusive", "--time=5", script=folder / "train.py")
    said = wait_for("an estimate", lambda: status(fresh, job)["starts_in"])
    assert abs(time.time() + said - planned) < 20
    job.wait_state("RUNNING")
    started = time.time()
    print(f"planned {planned:.0f}, by status {said:.0f} s later, started {started:.0f}")
    # Slurm looks for jobs beyond their limit every half minute, and the job ends 30 s after SIGTERM at most
    assert planned - 5 < started < planned + 75
    assert len(job.wait_event("round")["nodes"]) in {3, 4}  # a node of the other job may be free later than the others


@ON_DEMAND
def test_for_a_job_that_fits_beside_waiting_jobs_the_plans_estimate_is_too_late_but_not_the_one_of_status(
    fresh: Cluster, folder: Path, submit: Callable[..., Job]
) -> None:
    busy(fresh, 3, 20)
    fresh.exec(["sbatch", "--exclusive", "-N4", "-t30", "--output=/dev/null", "--wrap=exec sleep 9000"])
    found = plan(fresh, folder, "--nodes=1:4", "--exclusive", "--time=5")
    assert found["rows"][0]["starts_in"] > 1500
    job = submit("--nodes=1:4", "--exclusive", "--time=5", script=folder / "train.py")
    job.wait_state("RUNNING", deadline=30)
