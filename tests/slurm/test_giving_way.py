"""A running job gives nodes to a job that waits for them, and takes as many back afterwards, on a real Slurm."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND
from test_grow import Steady
from test_site_bed import configured

OFTEN = """\
import contextlib

with contextlib.suppress(ImportError):
    from elastic_hpc.agent import lookout
    lookout.ASK_EVERY = 1.0
"""
"""Jobs query Slurm once a second instead of once a minute."""

Other = Callable[..., str]


@pytest.fixture
def gives_way(submit: Callable[..., Job], fresh: Cluster, folder: Path) -> Iterator[Callable[..., Steady]]:
    """Let users of a site see the nodes, without which jobs could not give way."""

    def do(*options: str) -> Steady:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(OFTEN)
        script = Path(shutil.copy(Path(__file__).with_name("steady.py"), folder))
        grows = ["--grow", "--grow-every", "1", "--free-growth", "--exclusive"]
        often = ["--yield-every", "5", "--setup", f"export PYTHONPATH={folder / 'site'}"]
        return Steady(submit("--nodes", "2:4", *grows, *often, *options, script=script), folder)

    with configured(fresh, PrivateData="jobs") if fresh.is_site else contextlib.nullcontext():
        yield do


@pytest.fixture
def other(fresh: Cluster, folder: Path) -> Other:
    """Submits a rigid job and returns its id."""

    def do(nodes: int, seconds: int, *options: str) -> str:
        words = ["--parsable", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", f"--wrap=sleep {seconds}"]
        words += options
        return fresh.exec(["sbatch", *words], cwd=folder).stdout.strip()

    return do


def test_a_waiting_job_runs_on_nodes_that_an_elastic_job_gives_back_and_later_takes_again(
    gives_way: Callable[..., Steady], other: Other, fresh: Cluster
) -> None:
    job = gives_way("--yield-to", "pending")
    job.wait_world(4, 180)
    waiting = other(2, 15)
    gift = job.job.wait_event("yield")
    assert (gift["job"], gift["given"], gift["kept"]) == (waiting, 2, 2)
    assert job.job.wait_event("yielded", deadline=180)["reason"].startswith("it runs on n")
    job.wait_world(2)
    assert fresh.job_field(waiting, "JobState") in {"RUNNING", "COMPLETING", "COMPLETED"}
    job.wait_world(4, 180)
    job.finish()
    assert job.repeated_steps() == 0
    assert job.job.events("lost") == job.job.events("failure") == []
    assert job.job.verdict()["restarts"] == 0, "nothing is charged"
    assert [event["nodes"] for event in job.job.events("cap")] == [2, None], "its own joiners are nobody who waits"


@ON_DEMAND
@pytest.mark.parametrize("cluster", ["site"], indirect=True)
@pytest.mark.parametrize(
    ("to", "option", "outcome"),
    [
        ("qos:high", "--qos=high", "runs on n[3-4] instead"),
        ("partition:high", "--partition=high", "it runs on n[3-4]"),
        ("user", "--qos=normal", "it runs on n[3-4]"),
    ],
)
def test_on_a_site_nodes_are_given_up_for_a_qos_a_partition_or_jobs_of_the_same_user(
    gives_way: Callable[..., Steady], other: Other, fresh: Cluster, to: str, option: str, outcome: str
) -> None:
    """In the first case an older job takes the nodes; for that job alone, the job would not have given up nodes."""
    job = gives_way("--yield-to", to)
    job.wait_world(4, 240)
    if outcome.endswith("instead"):
        other(2, 15, "--qos=normal")
    waiting = other(2, 15, option)
    gift = job.job.wait_event("yield", deadline=180)
    assert (gift["job"], gift["given"]) == (waiting, 2)
    assert job.job.wait_event("yielded", deadline=180)["reason"].endswith(outcome)
    wait_for("that job to run", lambda: fresh.job_field(waiting, "JobState") != "PENDING", 180)
    job.wait_world(2)
    job.wait_world(4, 300)
    job.finish()
    assert job.repeated_steps() == 0
    assert job.job.verdict()["restarts"] == 0
    assert len(job.job.events("yield")) == 1
