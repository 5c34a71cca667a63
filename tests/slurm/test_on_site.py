"""Elastic jobs on a cluster that is configured as sites do it, in cases where the configuration matters."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COUNTS, Cluster, Job, wait_for
from on_demand import ON_DEMAND
from test_drain import LISTENS
from test_site_bed import ended

Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def cluster(site: Cluster) -> Cluster:
    return site


@pytest.fixture
def counts(submit: Submit, folder: Path) -> Submit:
    """Submit counts.py, which runs until the file ``hold`` is removed."""

    def do(*options: str) -> Job:
        (folder / "hold").touch()
        return submit(*options, "--time", "10", script=COUNTS)

    return do


@contextlib.contextmanager
def delayed(cluster: Cluster, script: str, seconds: int) -> Iterator[None]:
    """Let the site's ``script``, for example "epilog", take ``seconds``."""
    path = cluster.state / f"site/{script}_delay"
    path.write_text(str(seconds))
    try:
        yield
    finally:
        path.unlink()


def idle_nodes(cluster: Cluster) -> set[str]:
    """The nodes as root sees them: users see no nodes here."""
    shown = cluster.mini("exec", "--root", "--", "sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
    return set(shown.stdout.split())


def test_a_job_ends_although_slurm_believes_for_minutes_that_its_lost_node_is_alive(
    counts: Submit, fresh: Cluster
) -> None:
    job = counts("--nodes", "2:3")
    job.wait_steps(10)
    fresh.mini("kill", "n3")
    job.wait_event("round", 2)
    (job.folder / "hold").unlink()
    job.wait_event("verdict")
    assert job.wait_state("COMPLETED", "FAILED", deadline=40) == "COMPLETED", job.output()
    job.assert_steps_contiguous(10)
    assert job.worlds() == [3, 2]
    assert job.verdict()["outcome"] == "finished"
    # Slurm keeps one record for each size of a job that lost a node: only the last record has the end.
    assert ended(fresh, job.id) == ["RESIZING|0:0", "COMPLETED|0:0"]


@ON_DEMAND
def test_a_job_that_lost_its_first_node_frees_the_others_within_seconds_and_completes_when_slurm_knows(
    counts: Submit, fresh: Cluster
) -> None:
    job = counts("--nodes", "2:4")
    job.wait_steps(10)
    fresh.mini("kill", "n1")
    job.wait_event("take_over")
    (job.folder / "hold").unlink()
    job.wait_event("verdict")
    wait_for("the nodes that work to be idle", lambda: idle_nodes(fresh) >= {"n2", "n3", "n4"}, 60)
    assert fresh.job_field(job.id, "JobState") == "COMPLETING"
    fresh.wait_noticed("n1")
    job.wait_state("PENDING")
    fresh.mini("exec", "--root", "--", "scontrol", "update", f"JobId={job.id}", "StartTime=now")
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert ended(fresh, job.id)[-1] == "COMPLETED|0:0"


@ON_DEMAND
def test_a_job_restarts_soon_without_the_dead_node_where_users_see_no_nodes_and_the_epilog_takes_12_seconds(
    counts: Submit, fresh: Cluster
) -> None:
    with delayed(fresh, "epilog", 12):
        job = counts("--nodes", "3")
        job.wait_steps(10)
        fresh.mini("kill", "n3")
        verdict, again = job.wait_event("verdict"), job.wait_event("allocation", 2, deadline=180)
    assert again["started"] - verdict["time"] < 75, "Slurm's own delay is 121 s after the epilog"
    (job.folder / "hold").unlink()
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert [event["nodes"] for event in job.events("round")] == [["n1", "n2", "n3"], ["n1", "n2", "n4"]]
    assert "cannot read the states of nodes" in job.output()


@ON_DEMAND
def test_a_restarted_agent_outlives_the_agent_that_restarted_it_and_is_restarted_again(
    counts: Submit, fresh: Cluster
) -> None:
    job = counts("--nodes", "2:4")
    job.wait_steps(10)
    leader, *_, last = job.wait_event("round")["nodes"]
    os.kill(fresh.agents(last)[0], signal.SIGKILL)
    assert job.wait_event("join", 5)["node"] == last
    os.kill(fresh.agents(leader)[0], signal.SIGKILL)  # Slurm kills all processes that the leader has started
    job.wait_event("take_over")
    wait_for("the new agent to follow", lambda: last in [event["node"] for event in job.events("join")[5:]])
    job.wait_steps(50, round=3)
    assert [event["node"] for event in job.events("lost")] == [last]
    os.kill(fresh.agents(last)[0], signal.SIGKILL)
    wait_for("one more agent", lambda: [e["node"] for e in job.events("agent_restart")].count(last) == 2, 30)
    (job.folder / "hold").unlink()
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()


@ON_DEMAND
def test_a_warning_that_comes_before_the_agents_takes_effect_when_they_have_started(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = folder / "listens.py"
    script.write_text(LISTENS)
    with delayed(fresh, "task_prolog", 5):
        job = submit("--nodes", "2", "--time", "10", script=script, args=["200"])
        wait_for("the batch script", (job.run_dir / "script.sbatch").exists)
        fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
        assert not job.events("start")
        assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    outcomes = [(event["outcome"], event["cause"]) for event in job.events("verdict")]
    assert outcomes == [("requeue", "time limit"), ("finished", "")]
