"""The user makes a running job smaller: Slurm gets nodes back, and another job runs there while the job trains on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, wait_for
from on_demand import ON_DEMAND
from test_grow import SOON, Steady, Submit, busy, steady  # noqa: F401 - fixtures
from torch_214 import IN_PLACE, TORCH_214

HPC = str(Path(sys.executable).with_name("elastic-hpc"))


def ask(job: Steady, command: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return job.cluster.exec([HPC, command, str(job.job.run_dir), *words], cwd=job.data, check=check)


def given_back(job: Steady) -> list[str]:
    return sorted(name for event in job.job.events("given_back") for name in event["nodes"])


def nodes_of(job: Steady) -> str:
    return job.cluster.job_field(job.job.id, "NodeList")


def assert_nothing_was_lost(job: Steady) -> None:
    assert job.repeated_steps() == 0
    assert job.job.events("lost") == []
    assert {event["restarts"] for event in job.job.events("round")} == {0}


def test_another_job_runs_on_nodes_that_a_job_gives_back_while_that_job_trains_on_without_a_lost_step(
    steady: Callable[..., Steady],  # noqa: F811
    busy: Callable[..., str],  # noqa: F811
    fresh: Cluster,
) -> None:
    job = steady("--nodes", "2:4", "--exclusive", "--max-restarts", "0")
    job.wait_world(4)
    assert "if no steps are reported, within a minute: n[3-4]" in ask(job, "resize", "1:2").stdout
    busy("n3", "n4")
    job.wait_world(2)
    assert (given_back(job), nodes_of(job)) == (["n3", "n4"], "n[1-2]")
    refused = ask(job, "release", "n1", check=False)
    assert refused.returncode == 1
    assert "n1 leads the job" in refused.stderr
    assert "2 of 1:2" in ask(job, "status").stdout
    assert "does not grow" in ask(job, "resize", "1:4").stdout
    job.finish()
    assert_nothing_was_lost(job)
    assert "has ended, COMPLETED" in ask(job, "resize", "3", check=False).stderr


@ON_DEMAND
@pytest.mark.site
def test_a_job_gives_nodes_back_loses_its_leader_and_grows_again(
    steady: Callable[..., Steady],  # noqa: F811
    busy: Callable[..., str],  # noqa: F811
    fresh: Cluster,
) -> None:
    job = steady("--nodes", "2:4", *SOON)
    job.wait_world(4)
    ask(job, "resize", "1:3")
    other = busy("n4")
    job.wait_world(3)
    assert_nothing_was_lost(job)
    (agent,) = fresh.agents("n1")
    os.kill(agent, signal.SIGKILL)
    job.job.wait_event("take_over")
    job.wait_all_again(3)
    assert not job.joiners(), "the new leader knows the bounds"
    fresh.exec(["scancel", other])
    ask(job, "resize", "1:4")
    job.wait_world(4)
    ask(job, "resize", "1:3")
    job.wait_world(3)
    wait_for("the joiner to end", lambda: not job.joiners(), 60)
    job.finish()


@ON_DEMAND
@pytest.mark.parametrize("cluster", ["site"], indirect=True)  # without accounting a job gives nodes back only once
def test_named_nodes_are_given_back_and_a_requeue_keeps_the_bounds(
    steady: Callable[..., Steady],  # noqa: F811
    fresh: Cluster,
) -> None:
    job = steady("--nodes", "2:4", "--exclusive")
    job.wait_world(4)
    ask(job, "resize", "1:3")
    job.wait_world(3)
    wait_for("n4 to be given back", lambda: given_back(job) == ["n4"], 30)
    fresh.exec(["scancel", "--batch", "--signal=URG", job.job.id])
    wait_for("the requeue", lambda: fresh.job_field(job.job.id, "Restarts") == "1")
    job.job.wait_event("round", 3, deadline=240)
    assert len(job.job.events("round")[-1]["nodes"]) == 3
    refused = ask(job, "release", "n2", "n9", check=False)
    assert "n9 is not a node of this job; its nodes: n[1-3]; released: n2" in refused.stderr
    job.wait_world(2)
    wait_for("n2 to be given back", lambda: "n2" in given_back(job), 30)
    assert nodes_of(job) == "n[1,3]"
    job.finish()


@IN_PLACE
@ON_DEMAND
def test_workers_that_stay_alive_continue_in_the_smaller_world_and_repeat_no_step(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = Path(shutil.copy(Path(__file__).with_name("matrix_live.py"), folder / "matrix.py"))
    hold = folder / "hold.training.1"
    fresh.exec(["touch", str(hold)])
    job = Steady(submit("--nodes", "2:4", "--exclusive", "--python", TORCH_214, script=script), folder)
    wait_for("all workers in a step", lambda: len(list(folder.glob("at.training.1.*"))) == 4)
    assert "n[3-4]" in ask(job, "resize", "1:2").stdout
    hold.unlink()
    job.job.wait_state("COMPLETED")
    assert given_back(job) == ["n3", "n4"]
    pids, steps = defaultdict(set), defaultdict(list)
    for step in job.job.lines(folder / "steps.jsonl"):
        pids[step["node"]].add(step["pid"])
        steps[step["node"]].append(step["step"])
    for node in ("n1", "n2"):
        assert (len(pids[node]), steps[node]) == (1, list(range(1, 61)))
    assert steps["n3"] == steps["n4"] == list(range(1, 17))
    assert [event["kept"] for event in job.job.events("started")] == [0, 2]


@ON_DEMAND
def test_a_job_that_waits_after_a_requeue_requests_the_new_number_of_nodes_from_slurm(
    steady: Callable[..., Steady],  # noqa: F811
    fresh: Cluster,
) -> None:
    job = steady("--nodes", "2:4", "--exclusive")
    job.wait_world(4)
    fresh.exec(["scancel", "--batch", "--signal=URG", job.job.id])
    wait_for("the requeue", lambda: fresh.job_field(job.job.id, "JobState") == "PENDING")
    assert "waits in the queue" in ask(job, "resize", "1:2").stdout
    job.job.wait_event("round", 2, deadline=240)
    assert len(job.job.events("round")[-1]["nodes"]) == 2
    assert fresh.job_field(job.job.id, "NumNodes") == "2"
    job.finish()


@ON_DEMAND
def test_the_size_of_a_job_that_has_never_started_changes_only_by_a_new_submission(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    job = submit("--nodes", "2:4", "--hold")
    refused = fresh.exec([HPC, "resize", job.id, "1:2"], cwd=folder, check=False)
    assert refused.returncode == 1
    assert f"has not started yet: type elastic-hpc stop {job.id}, then submit it with --nodes 1:2" in refused.stderr
    fresh.exec([HPC, "stop", job.id], cwd=folder)
