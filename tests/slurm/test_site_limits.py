"""What a site forbids or delays: elastic jobs cope, ``status`` and ``why`` name the
reason, and the doctor reports it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COUNTS, Cluster, Job, wait_for
from on_demand import ON_DEMAND
from test_doctor_site import doctor
from test_site_bed import ended, forbids_shrinking, root

Submit = Callable[..., Job]
TOOL = str(Path(sys.executable).with_name("elastic-hpc"))


@pytest.fixture(scope="module")
def cluster(site: Cluster) -> Cluster:
    return site


@pytest.fixture
def one_job(fresh: Cluster) -> Iterator[None]:
    limit = ["sacctmgr", "--immediate", "modify", "user", "minislurm", "set"]
    root(fresh, *limit, "MaxJobs=1")
    yield
    root(fresh, *limit, "MaxJobs=-1")


@pytest.fixture
def no_shrink(cluster: Cluster) -> Iterator[None]:
    with forbids_shrinking(cluster, PreemptType="preempt/qos"):
        yield


def tool(job: Job, command: str) -> str:
    return job.cluster.exec([TOOL, command, job.id], cwd=job.folder, check=False).stdout


def idle(cluster: Cluster, node: str) -> bool:
    return "State=IDLE " in root(cluster, "scontrol", "show", "node", node)


@ON_DEMAND
@pytest.mark.usefixtures("one_job")
def test_a_job_does_not_wait_for_a_joiner_that_its_user_may_not_run(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    (folder / "hold").touch()
    job = submit("--nodes", "2:3", "--time", "10", "--grow", "--grow-every", "1", "--exclusive", script=COUNTS)
    job.wait_steps(10)
    fresh.mini("kill", "n3")
    job.wait_event("round", 2)
    problem = job.wait_event("growth_problem")
    assert problem["reason"].endswith("does not start when nodes are free: AssocMaxJobsLimit")
    assert f"no further nodes: {problem['reason']}" in " ".join(tool(job, "status").split())
    fresh.mini("kill", "n2")
    lost = time.time()
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1")
    verdict = job.events("verdict")[0]
    assert verdict["outcome"] == "requeue"
    assert verdict["time"] - lost < 60, "it must not wait for the joiner for the 300 s of --wait-for-nodes"
    (folder / "hold").unlink()
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert "AssocMaxJobsLimit" in tool(job, "why")
    found = doctor(fresh, folder)["limits"]
    assert (found["level"], found["found"]) == ("warn", "MaxJobs = 1 in account research")


@ON_DEMAND
@pytest.mark.usefixtures("no_shrink")
def test_where_no_job_may_shrink_its_working_nodes_are_still_free_at_its_end(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    (folder / "hold").touch()
    job = submit("--nodes", "2:3", "--time", "10", "--exclusive", script=COUNTS)
    job.wait_steps(10)
    fresh.mini("kill", "n3")
    job.wait_event("round", 2)
    (folder / "hold").unlink()
    verdict = job.wait_event("verdict")
    wait_for("n1 and n2 to be free", lambda: idle(fresh, "n1") and idle(fresh, "n2"), 60)
    took = time.time() - verdict["time"]
    print("free after", took, "s;", fresh.job_field(job.id, "JobState"), fresh.job_field(job.id, "NodeList"))
    assert took < 20
    assert fresh.job_field(job.id, "JobState") == "COMPLETING"
    fresh.mini("heal", "n3")  # with SlurmdTimeout=300 Slurm hears of the loss from the administrator
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert job.verdict()["outcome"] == "finished"
    assert ended(fresh, job.id) == ["COMPLETED|0:0"]
    found = doctor(fresh, folder)
    assert "disable_job_shrink" in found["SlurmdTimeout"]["found"]
    assert found["preemption"]["means"] == "jobs in QOS normal are not preempted"
    (folder / "elastic_hpc.toml").write_text('[sbatch]\nqos = "low"\n')
    assert doctor(fresh, folder)["preemption"]["found"].startswith("QOS low: PreemptMode = REQUEUE, GraceTime = 10 s")


def test_the_doctor_reports_what_the_site_has_configured_and_what_to_do(fresh: Cluster, folder: Path) -> None:
    found = doctor(fresh, folder, "--run", "--nodes", "2")
    levels = {about: finding["level"] for about, finding in found.items()}
    assert {about for about, level in levels.items() if level in {"bad", "unknown"}} == set(), found
    notes = {"SlurmdTimeout", "prolog", "memory", "private data"}
    assert {levels[about] for about in notes} == {"note"}
    assert re.match(r"Prolog = \S+/site/prolog, PrologEpilogTimeout = none$", found["prolog"]["found"])
    assert levels["epilog"] == "ok", "measured"
    assert "300 s and more" in found["SlurmdTimeout"]["means"]
    assert re.match(r"DefMemPerCPU = \d+$", found["memory"]["found"])
    assert "limits" not in found
    epilog = doctor(fresh, folder)["epilog"]
    assert re.match(r"Epilog = \S+/site/epilog, PrologEpilogTimeout = none$", epilog["found"])
    assert "121 s after" in epilog["means"]
