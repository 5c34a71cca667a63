"""The job leaves a node before it fails or is taken away, at a step boundary, and gives the node back to Slurm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Cluster, wait_for
from on_demand import ON_DEMAND
from test_grow import SOON, Steady, Submit, steady  # noqa: F401 - fixtures
from test_resize import HPC, ask, assert_nothing_was_lost, given_back, nodes_of

SOONER = "import elastic_hpc.agent.lookout as lookout; lookout.ASK_EVERY = 2.0\n"


@pytest.fixture
def watched(steady: Callable[..., Steady], folder: Path, fresh: Cluster) -> Callable[..., Steady]:  # noqa: F811
    """A job that asks Slurm about its nodes every two seconds, not once a minute."""

    def do(*options: str) -> Steady:
        fresh.exec(["mkdir", str(folder / "site")])
        (folder / "site" / "sitecustomize.py").write_text(SOONER)
        return steady("--exclusive", "--setup", f"export PYTHONPATH={folder / 'site'}", *options)

    return do


@contextmanager
def drained(cluster: Cluster, node: str) -> Iterator[None]:
    def update(*words: str) -> None:
        cluster.mini("exec", "--root", "--", "scontrol", "update", f"NodeName={node}", *words)

    update("State=DRAIN", "Reason=ECC errors rising")
    try:
        yield
    finally:
        update("State=RESUME")


def state_of(cluster: Cluster, node: str) -> str:
    found = re.search(r"State=(\S+)", cluster.exec(["scontrol", "show", "node", node]).stdout)
    assert found
    return found[1]


def test_a_drained_node_is_left_with_no_step_lost_and_becomes_idle_and_drained(
    watched: Callable[..., Steady], fresh: Cluster
) -> None:
    job = watched("--nodes", "2:3", "--max-restarts", "0")
    job.wait_world(3)
    with drained(fresh, "n2"):
        job.wait_world(2)
        wait_for("n2 to be given back", lambda: given_back(job) == ["n2"], 30)
        assert nodes_of(job) == "n[1,3]"
        wait_for("n2 to be idle", lambda: state_of(fresh, "n2") == "IDLE+DRAIN", 30)
        shown = ask(job, "why").stdout
        assert "n2" in shown
        assert "drained in Slurm: ECC errors rising" in shown
        job.finish()
    assert_nothing_was_lost(job)


@ON_DEMAND
def test_in_the_interval_of_a_real_job_a_drained_node_is_left_within_70_seconds(
    steady: Callable[..., Steady],  # noqa: F811
    fresh: Cluster,
) -> None:
    job = steady("--exclusive", "--nodes", "2:3")
    job.wait_world(3)
    with drained(fresh, "n3"):
        job.wait_world(2, 70)
        job.finish()
    assert_nothing_was_lost(job)


@ON_DEMAND
def test_below_min_a_drained_node_stays_until_a_joiner_comes_and_permanently_if_the_drain_is_undone(
    watched: Callable[..., Steady], fresh: Cluster
) -> None:
    job = watched("--nodes", "2:2", *SOON)
    job.wait_world(2)
    with drained(fresh, "n3"), drained(fresh, "n4"), drained(fresh, "n2"):
        job.job.wait_event("stays")
        assert "drained in Slurm: ECC errors rising" in ask(job, "status").stdout
    job.job.wait_event("stay")
    with drained(fresh, "n2"):
        wait_for("n2 to be given back", lambda: given_back(job) == ["n2"], 90)
    job.wait_world(2)
    job.finish()
    assert_nothing_was_lost(job)


@ON_DEMAND
def test_the_job_leaves_nodes_before_their_maintenance(watched: Callable[..., Steady], fresh: Cluster) -> None:
    job = watched("--nodes", "2:3")
    job.wait_world(3)
    options = ["starttime=now+200", "duration=60", "nodes=n3", "flags=maint,ignore_jobs", "user=root"]
    fresh.mini("exec", "--root", "--", "scontrol", "create", "reservation", "reservationname=day", *options)
    try:
        wait_for("n3 to be given back", lambda: given_back(job) == ["n3"], 60)
        assert "maintenance in Slurm: day" in ask(job, "why").stdout
        job.finish()
    finally:
        fresh.mini("exec", "--root", "--", "scontrol", "delete", "reservationname=day")
    assert_nothing_was_lost(job)


@ON_DEMAND
def test_a_notice_and_a_file_of_the_site_make_a_job_leave_nodes(
    steady: Callable[..., Steady],  # noqa: F811
    folder: Path,
    fresh: Cluster,
) -> None:
    health = folder / "health"
    fresh.exec(["mkdir", str(health)])
    job = steady("--exclusive", "--nodes", "2:4", "--health-dir", str(health))
    job.wait_world(4)
    (health / "segment_health_check.n3").write_text("Xid 79\n")
    told = fresh.mini("exec", "--root", "--node", "n4", "--", HPC, "notice", "--node", "n4", "ECC errors rising").stdout
    assert "leaves n4" in told
    job.wait_world(2)
    wait_for("the first to be given back", lambda: given_back(job), 30)  # without accounting, only once in each run
    assert {event["reason"] for event in job.job.events("leave")} == {"Xid 79", "ECC errors rising"}
    job.finish()
    assert_nothing_was_lost(job)


@ON_DEMAND
@pytest.mark.parametrize("cluster", ["site"], indirect=True)
def test_where_users_see_no_nodes_a_health_check_of_the_site_gives_notice(
    steady: Callable[..., Steady],  # noqa: F811
    fresh: Cluster,
) -> None:
    site = fresh.state / "site"
    check, sick = site / "health_check", site / "ecc-n3"
    job = steady("--exclusive", "--nodes", "2:3", "--max-restarts", "0")
    job.wait_world(3, 180)
    before = check.read_text()
    line = f"[ ! -e {site}/ecc-$node ] || {HPC} notice --node $node 'ECC errors rising' >>{site}/notices 2>&1 || :\n"
    try:
        check.write_text(before + line)
        sick.touch()
        assert job.job.wait_event("leave", deadline=180)["reason"] == "ECC errors rising"
        job.wait_world(2)
        wait_for("n3 to be given back", lambda: given_back(job) == ["n3"], 60)
    finally:
        sick.unlink(missing_ok=True)
        check.write_text(before)
        print((site / "notices").read_text() if (site / "notices").exists() else "no notice")
    assert nodes_of(job) == "n[1-2]"
    assert job.job.wait_event("unseen")["what"] == "the state of the nodes in Slurm"
    job.finish()
    assert_nothing_was_lost(job)
    wait_for("the output", lambda: "finished" in job.job.output())
    assert "Exited with exit code" not in job.job.output(), "what has let a node go has not failed"
