"""What a user sees, and what a job does, where Slurm lets no job give nodes back (``disable_job_shrink``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from conftest import Cluster, wait_for
from on_demand import ON_DEMAND
from test_doctor_site import doctor
from test_giving_way import Other, gives_way, other  # noqa: F401 - fixtures
from test_grow import SOON, Steady, busy, steady  # noqa: F401 - fixtures
from test_resize import ask, assert_nothing_was_lost, given_back, nodes_of
from test_site_bed import forbids_shrinking

pytestmark = [ON_DEMAND, pytest.mark.usefixtures("no_shrinking"), pytest.mark.site]
FORBIDDEN = "this site does not let a job give nodes back (SchedulerParameters=disable_job_shrink)"


@pytest.fixture
def no_shrinking(fresh: Cluster) -> Iterator[None]:
    with forbids_shrinking(fresh, PrivateData="jobs"):
        yield


def test_joiners_can_be_released_and_for_other_nodes_the_commands_report_that_the_site_forbids_it(
    steady: Callable[..., Steady],  # noqa: F811
    busy: Callable[..., str],  # noqa: F811
    fresh: Cluster,
) -> None:
    occupies = busy("n3")
    busy("n4")
    job = steady("--nodes", "1:3", "--free-growth", *SOON)
    job.wait_world(2, 240)
    fresh.exec(["scancel", occupies])
    job.wait_world(3, 240)
    for command, words in (("resize", ["1:1"]), ("release", ["n2"]), ("release", ["n3", "n2"])):
        refused = ask(job, command, *words, check=False)
        assert refused.returncode == 1
        assert FORBIDDEN in refused.stderr
    assert "within a minute: n3" in ask(job, "resize", "1:2").stdout
    job.wait_world(2)
    wait_for("no joiner", lambda: not job.joiners(), 60)
    assert nodes_of(job) == "n[1-2]"
    ask(job, "resize", "1:3")
    job.wait_world(3, 240)
    ask(job, "release", "n3")
    job.wait_world(2)
    finding = doctor(fresh, job.data)["giving back"]
    assert (finding["level"], finding["found"]) == ("warn", "SchedulerParameters has disable_job_shrink")
    ask(job, "resize", "1:2")  # otherwise a joiner would replace the next node that leaves
    ask(job, "notice", "--node", "n2", "ECC errors rising")
    assert job.job.wait_event("not_given_back")["nodes"] == ["n2"]
    job.wait_world(1)
    assert "Slurm did not take back n2" in ask(job, "why").stdout
    job.finish()
    assert_nothing_was_lost(job)
    assert given_back(job) == []


def test_a_job_that_gives_way_releases_joiners_and_keeps_its_own_nodes(
    gives_way: Callable[..., Steady],  # noqa: F811
    other: Other,  # noqa: F811
    busy: Callable[..., str],  # noqa: F811
    fresh: Cluster,
) -> None:
    occupies = busy("n4")
    job = gives_way("--yield-to", "pending")
    job.wait_world(3, 240)
    fresh.exec(["scancel", occupies])
    job.wait_world(4, 240)
    waiting = other(1, 10)
    assert job.job.wait_event("yield", deadline=180)["job"] == waiting
    assert job.job.wait_event("yielded", deadline=180)["reason"] == "it runs on n4"
    job.wait_world(3)
    job.wait_world(4, 240)
    waiting, step = other(2, 10), job.step()
    wait_for("some looks at the queue", lambda: job.step() > step + 400)
    assert fresh.job_field(waiting, "JobState") == "PENDING"
    assert (len(job.job.events("yield")), nodes_of(job)) == (1, "n[1-3]")
    fresh.exec(["scancel", waiting])
    job.wait_world(4, 240)
    job.finish()
    assert_nothing_was_lost(job)
    assert job.job.events("not_given_back") == []
