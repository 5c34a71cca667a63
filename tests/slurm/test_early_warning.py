"""A job on a site whose prolog takes longer than the job has until Slurm warns of the time limit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from test_site_bed import ended, ran_at, root

PROLOG_S = 40


@pytest.fixture(scope="module")
def cluster(site: Cluster) -> Cluster:
    return site


@pytest.mark.skipif("ELASTIC_HPC_ALL_FAULTS" not in os.environ, reason="takes two minutes: ELASTIC_HPC_ALL_FAULTS=1")
def test_a_job_that_is_warned_while_its_prolog_runs_saves_and_returns(
    submit: Callable[..., Job], fresh: Cluster, folder: Path
) -> None:
    delay, script = fresh.state / "site/prolog_delay", Path(shutil.copy(Path(__file__).with_name("steady.py"), folder))
    delay.write_text(str(PROLOG_S))
    try:
        job = submit("--nodes", "2", "--time", "2", "--grace", "70", script=script)  # warned 100 s before the end
        job.data = folder
        verdict = job.wait_event("verdict", deadline=150)
    finally:
        delay.unlink()
    assert (verdict["outcome"], verdict["cause"]) == ("requeue", "time limit")
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1")
    root(fresh, "scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    done = job.steps()[-1]["step"]
    began, prolog = job.events("start")[0]["time"], ran_at(fresh, "prolog", job.id)
    assert prolog is not None
    assert prolog <= began, "the warning came 20 s after the start of the job, before the end of the prolog"
    (folder / "finish").touch()
    assert job.wait_state("COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", job.output()
    assert job.steps()[-1]["step"] == done + 1, "it went on where it had saved"
    assert [record.partition("|")[0] for record in ended(fresh, job.id)][-1] == "COMPLETED"
