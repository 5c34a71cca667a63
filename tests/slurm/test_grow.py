"""Running jobs take in nodes, replace lost ones, and give back what they cannot use, on a real Slurm."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from test_recovery import agents

Submit = Callable[..., Job]
SOON = ["--grow", "--grow-every", "1", "--exclusive"]  # two joiners could share a node else


class Steady:
    """A job of steady.py, and the queue that it grows from."""

    def __init__(self, job: Job, data: Path) -> None:
        self.job, self.data, self.cluster = job, data, job.cluster

    def world(self) -> int:
        """Of the last step."""
        steps = self.job.lines(self.data / "steps.jsonl")
        return int(steps[-1]["world_size"]) if steps else 0

    def wait_world(self, size: int, deadline: float = 90) -> None:
        wait_for(f"a step of {size} workers", lambda: self.world() == size, deadline)

    def wait_all_again(self) -> None:
        """Until the newest round has all nodes and has done a step."""
        size = len(self.job.events("round")[0]["nodes"])

        def look() -> bool:
            formed, steps = self.job.events("round")[-1], self.job.lines(self.data / "steps.jsonl")
            return len(formed["nodes"]) == size and steps[-1]["round"] == formed["round"] > 1

        wait_for("all nodes again", look)

    def worlds(self) -> list[int]:
        return list({step["round"]: step["world_size"] for step in self.job.lines(self.data / "steps.jsonl")}.values())

    def joiners(self) -> dict[str, str]:
        """State by id."""
        listed = self.cluster.exec(["squeue", "--noheader", f"--name=join-{self.job.id}", "--format=%A %T"]).stdout
        return dict(line.split() for line in listed.splitlines())

    def finish(self) -> None:
        """The job is completed at once, has done each step once after the other, and holds no node any more."""
        self.cluster.exec(["touch", str(self.data / "finish")])
        state = self.job.wait_state("COMPLETED", "FAILED", "CANCELLED")
        assert state == "COMPLETED", self.job.output()[-3000:]
        assert self.job.verdict()["outcome"] == "finished"
        wait_for("no joiner", lambda: not self.joiners(), 30)

    def repeated_steps(self) -> int:
        """Steps that were done twice; one that was left out fails."""
        steps = [step["step"] for step in self.job.lines(self.data / "steps.jsonl")]
        assert all(after <= before + 1 for before, after in itertools.pairwise(steps)), "a step was left out"
        return len(steps) - len(set(steps))


@pytest.fixture
def steady(submit: Submit, folder: Path) -> Callable[..., Steady]:
    def do(*options: str) -> Steady:
        script = Path(shutil.copy(Path(__file__).with_name("steady.py"), folder))
        return Steady(submit(*options, script=script), folder)

    return do


@pytest.fixture
def busy(fresh: Cluster, folder: Path) -> Callable[..., str]:
    """``busy("n3", "n4")``: another job has these nodes; the answer is its id."""

    def do(*nodes: str) -> str:
        options = [f"--nodes={len(nodes)}", "--exclusive", f"--nodelist={','.join(nodes)}", "--output=/dev/null"]
        id = fresh.exec(["sbatch", "--parsable", *options, "--wrap=sleep 600"], cwd=folder).stdout.strip()
        wait_for("the other job", lambda: fresh.job_field(id, "JobState") == "RUNNING")
        return id

    return do


def test_a_job_grows_loses_a_node_replaces_it_and_finishes(
    steady: Callable[..., Steady], busy: Callable[..., str], fresh: Cluster
) -> None:
    other = busy("n3", "n4")
    job = steady("--nodes", "2:4", *SOON)
    job.wait_world(2)
    wait_for("two joiners", lambda: sorted(job.joiners().values()) == ["PENDING", "PENDING"], 30)
    fresh.exec(["scancel", other])
    job.wait_world(4)
    assert job.repeated_steps() == 0, "growth costs no step where the script listens"
    fresh.mini("kill", "n4")
    job.wait_world(3)
    fresh.mini("heal", "n4")
    job.wait_world(4)
    job.finish()
    assert job.worlds() == [2, 4, 3, 4]
    assert job.repeated_steps() <= 100
    assert fresh.job_field(job.job.id, "Restarts") == "0"


def test_an_agent_that_was_killed_comes_back_in_the_same_allocation_and_so_do_all_one_after_the_other(
    steady: Callable[..., Steady], fresh: Cluster
) -> None:
    """In the end none of the agents that srun has started is left, and the batch script still waits for the verdict."""
    job = steady("--nodes", "2:3", "--grow-every", "1")
    job.wait_world(3)
    for restarts, node in enumerate(("n3", "n1", "n2"), 1):
        (agent,) = agents(fresh, node)
        os.kill(agent, signal.SIGKILL)
        job.job.wait_event("agent_restart", restarts)
        job.wait_all_again()
    assert [event["node"] for event in job.job.events("agent_restart")] == ["n3", "n1", "n2"]
    assert fresh.processes("conclude", "n1"), "the first srun is over"
    job.finish()
