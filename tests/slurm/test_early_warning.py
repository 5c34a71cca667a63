"""A job on a site whose prolog lasts beyond Slurm's warning before the time limit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND
from test_site_bed import ended, ran_at, root


@pytest.fixture(scope="module")
def cluster(site: Cluster) -> Cluster:
    return site


@ON_DEMAND
@pytest.mark.parametrize(("prolog_s", "grace_s"), [(40, 70), (50, 35)])
def test_a_job_that_is_warned_during_its_prolog_saves_and_is_requeued(
    submit: Callable[..., Job], fresh: Cluster, folder: Path, prolog_s: int, grace_s: int
) -> None:
    """Slurm warns 30 s before the grace begins, or half a minute earlier: in the second case the warning is not due yet
    when the prolog has ended.
    """
    delay, script = fresh.state / "site/prolog_delay", Path(shutil.copy(Path(__file__).with_name("steady.py"), folder))
    delay.write_text(str(prolog_s))
    try:
        job = submit("--nodes", "2", "--time", "2", "--grace", str(grace_s), script=script)
        job.data = folder
        verdict = job.wait_event("verdict", deadline=150)
    finally:
        delay.unlink()
    assert (verdict["outcome"], verdict["cause"]) == ("requeue", "time limit")
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1")
    root(fresh, "scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    done = max((step["step"] for step in job.steps()), default=0)  # no steps if warned before the first round
    prolog = ran_at(fresh, "prolog", job.id)
    assert prolog is not None
    assert prolog <= job.events("start")[0]["time"]
    (folder / "finish").touch()
    assert job.wait_state("COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", job.output()
    assert job.steps()[-1]["step"] == done + 1, "it went on where it had saved"
    assert [record.partition("|")[0] for record in ended(fresh, job.id)][-1] == "COMPLETED"
