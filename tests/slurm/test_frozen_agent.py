"""A job completes once it has a verdict, even if an agent cannot leave its node."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND

SCRIPT = """
import os, time
run = os.environ["ELASTIC_HPC_RUN_DIR"]
open(f"{run}/up.{os.environ['ELASTIC_HPC_ROUND']}.{os.environ['RANK']}", "w").close()
while not os.path.exists(f"{run}/enough"):
    time.sleep(0.1)
"""


@pytest.fixture
def job(folder: Path, submit: Callable[..., Job]) -> Job:
    script = folder / "wait.py"
    script.write_text(SCRIPT)
    return submit("--nodes", "2:3", script=script)


def up(job: Job, world: int) -> bool:
    rounds = [event["round"] for event in job.events("round") if event["world_size"] == world]
    return bool(rounds) and len([*job.run_dir.glob(f"up.{rounds[-1]}.*")]) == world


def test_a_job_with_a_verdict_completes_although_an_agent_is_frozen(job: Job, fresh: Cluster) -> None:
    """The agent's guard is frozen too, like everything on that node."""
    wait_for("three workers", lambda: up(job, 3))
    third = job.wait_event("round")["nodes"][2]
    frozen = [*fresh.agents(third), *fresh.processes("guard.py", third)]
    assert len(frozen) == 2
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    wait_for("a world without the frozen agent", lambda: up(job, 2))
    fresh.exec(["touch", str(job.run_dir / "enough")])
    job.wait_event("verdict")
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=110) == "COMPLETED", job.output()
    assert "elastic_hpc: finished" in job.output()
    wait_for("the end of the frozen agent", lambda: not fresh.agents(third))


@ON_DEMAND
def test_the_verdict_of_an_agent_that_found_no_leader_does_not_end_a_job_that_the_others_continue(
    job: Job, fresh: Cluster
) -> None:
    """The other agents are frozen for longer than that agent waits, as on nodes without CPU time."""
    wait_for("three workers", lambda: up(job, 3))
    first, second, third = job.wait_event("round")["nodes"]
    frozen = [pid for node in (first, second) for pid in [*fresh.agents(node), *fresh.processes("guard.py", node)]]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    verdict = fresh.seen_from_login(job.run_dir / "verdict.json")
    wait_for("the verdict", verdict.exists)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    assert job.wait_event("withdrawn")["node"] == third
    wait_for("a world of the others", lambda: up(job, 2))
    time.sleep(60)  # only the existence of the job shows that the batch script has not ended it
    fresh.exec(["touch", str(job.run_dir / "enough")])
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=110) == "COMPLETED", job.output()
    assert {event["run"] for event in job.events("start")} == {0}, "no requeue"
