"""Running jobs add nodes, replace lost nodes, and give back nodes that they cannot use, on a real Slurm."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND

Submit = Callable[..., Job]
SOON = ["--grow", "--grow-every", "1", "--exclusive"]  # otherwise two joiners could share a node


class Steady:
    """A job of steady.py, and its joiners in the queue."""

    def __init__(self, job: Job, data: Path) -> None:
        self.job, self.data, self.cluster = job, data, job.cluster

    def step(self) -> int:
        """The last step."""
        steps = self.job.lines(self.data / "steps.jsonl")
        return int(steps[-1]["step"]) if steps else 0

    def world(self) -> int:
        """World size of the last step."""
        steps = self.job.lines(self.data / "steps.jsonl")
        return int(steps[-1]["world_size"]) if steps else 0

    def wait_world(self, size: int, deadline: float = 90) -> None:
        wait_for(f"a step of {size} workers", lambda: self.world() == size, deadline)

    def wait_all_again(self, size: int = 0) -> None:
        """Wait until the newest round has ``size`` nodes (default: as many as the first round) and has done a step."""
        size = size or len(self.job.events("round")[0]["nodes"])

        def look() -> bool:
            formed, steps = self.job.events("round")[-1], self.job.lines(self.data / "steps.jsonl")
            return len(formed["nodes"]) == size and steps[-1]["round"] == formed["round"] > 1

        wait_for("all nodes again", look)

    def worlds(self) -> list[int]:
        return list({step["round"]: step["world_size"] for step in self.job.lines(self.data / "steps.jsonl")}.values())

    def joiners(self) -> dict[str, str]:
        """States of the joiners by id."""
        listed = self.cluster.exec(["squeue", "--noheader", f"--name=join-{self.job.id}", "--format=%A %T"]).stdout
        return dict(line.split() for line in listed.splitlines())

    def join_by_hand(self) -> str:
        """Submit a joiner that the leader has not requested. Returns its id."""
        variables = f"--export=ALL,ELASTIC_HPC_JOIN={self.job.run_dir}"
        script = str(self.job.run_dir / "script.sbatch")
        options = ["--nodes=1", "--no-requeue", "--output=/dev/null", variables]
        return self.cluster.exec(["sbatch", "--parsable", *options, script], cwd=self.data).stdout.strip()

    def finish(self) -> None:
        """Finish the job: it completes and leaves no joiner."""
        self.cluster.exec(["touch", str(self.data / "finish")])
        state = self.job.wait_state("COMPLETED", "FAILED", "CANCELLED")
        assert state == "COMPLETED", self.job.output()[-3000:]
        assert self.job.verdict()["outcome"] == "finished"
        wait_for("no joiner", lambda: not self.joiners(), 30)

    def repeated_steps(self) -> int:
        """Number of repeated steps. Fails if a step was skipped."""
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
    """``busy("n3", "n4")`` starts another job on these nodes and returns its id."""

    def do(*nodes: str) -> str:
        options = [f"--nodes={len(nodes)}", "--exclusive", f"--nodelist={','.join(nodes)}", "--output=/dev/null"]
        id = fresh.exec(["sbatch", "--parsable", *options, "--wrap=sleep 600"], cwd=folder).stdout.strip()
        wait_for("the other job", lambda: fresh.job_field(id, "JobState") == "RUNNING")
        return id

    return do


def test_a_job_grows_then_loses_a_node_then_replaces_it_and_finishes(
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
    late = job.join_by_hand()
    wait_for("a joiner that came too late to leave", lambda: fresh.job_field(late, "JobState") == "COMPLETED", 30)
    assert job.job.verdict()["outcome"] == "finished"


@ON_DEMAND
def test_after_a_takeover_or_a_requeue_the_job_still_knows_its_waiting_and_running_joiners(
    steady: Callable[..., Steady], busy: Callable[..., str], fresh: Cluster
) -> None:
    other = busy("n4")
    job = steady("--nodes", "2:4", *SOON)
    job.wait_world(3)
    (waiting,) = wait_for("a joiner", job.joiners, 30)
    (agent,) = fresh.agents("n1")
    os.kill(agent, signal.SIGKILL)
    job.job.wait_event("take_over")
    job.wait_all_again()
    assert list(job.joiners()) == [waiting]
    fresh.exec(["scancel", "--batch", "--signal=URG", job.job.id])
    wait_for("the requeue", lambda: fresh.job_field(job.job.id, "Restarts") == "1")
    assert waiting not in job.joiners()
    wait_for("another joiner", job.joiners, 240)  # if the job completes slowly, it starts two minutes later
    fresh.exec(["scancel", other])
    job.wait_world(4)
    running = job.joiners()
    (agent,) = fresh.agents("n1")
    os.kill(agent, signal.SIGKILL)
    job.job.wait_event("take_over", 2)
    job.wait_all_again(4)
    assert job.joiners() == running
    job.finish()
    assert job.repeated_steps() <= 200  # steps since the checkpoints before the takeovers


def test_a_joiner_that_is_warned_or_preempted_leaves_and_no_step_is_lost(
    steady: Callable[..., Steady], busy: Callable[..., str], fresh: Cluster
) -> None:
    other = busy("n3", "n4")
    job = steady("--nodes", "2:3", "--partition", "low", *SOON)
    job.wait_world(2)
    fresh.exec(["scancel", other])
    for preempted in (False, True):
        job.wait_world(3)
        (joiner,) = [id for id, state in job.joiners().items() if state == "RUNNING"]
        if preempted:
            node = f"--nodelist={fresh.job_field(joiner, 'NodeList')}"
            fresh.exec(["sbatch", "--partition=high", "--exclusive", node, "--output=/dev/null", "--wrap=sleep 600"])
        else:
            fresh.exec(["scancel", "--batch", "--signal=URG", joiner])
        job.wait_world(2)
        wait_for("it to be gone", lambda joiner=joiner: joiner not in job.joiners(), 40)
    job.wait_world(3)
    job.finish()
    assert job.worlds() == [2, 3, 2, 3, 2, 3]
    assert job.repeated_steps() == 0
    assert job.job.events("lost") == job.job.events("failure") == []


@ON_DEMAND
@pytest.mark.parametrize("partition", ["low", "lowcancel"])
def test_the_job_runs_where_it_is_safe_and_grows_where_nodes_are_preempted(
    steady: Callable[..., Steady], fresh: Cluster, partition: str
) -> None:
    """Four nodes are free. When another job takes a node, no step is repeated, and the job requests the node again."""
    job = steady("--nodes", "2:4", "--partition", "main", "--grow-partition", partition, *SOON)
    job.wait_world(4, 240)
    assert fresh.job_field(job.job.id, "NumNodes") == "2"
    joiners = [id for id, state in job.joiners().items() if state == "RUNNING"]
    assert [fresh.job_field(id, "Partition") for id in joiners] == [partition] * 2
    node = fresh.job_field(joiners[0], "NodeList")
    preempts = ["--partition=high", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 600"]
    other = fresh.exec(["sbatch", "--parsable", *preempts]).stdout.strip()
    job.wait_world(3, 240)
    wait_for("the other job to start", lambda: fresh.job_field(other, "JobState") == "RUNNING", 90)
    fresh.exec(["scancel", other])
    job.wait_world(4, 240)
    job.finish()
    assert job.worlds()[-3:] == [4, 3, 4]
    assert job.repeated_steps() == 0
    assert job.job.events("lost") == job.job.events("growth_problem") == []
    assert fresh.job_field(joiners[0], "Restarts") == "0"
    why = fresh.exec([str(Path(sys.executable).with_name("elastic-hpc")), "why", str(job.job.run_dir)]).stdout
    assert "preempted, cancelled or lost: 1;" in why
    assert "0 steps repeated" in why


@ON_DEMAND
def test_a_joiner_whose_own_time_limit_ends_leaves_without_a_lost_step_and_is_replaced(
    steady: Callable[..., Steady], fresh: Cluster
) -> None:
    job = steady("--nodes", "2:3", "--grow-partition", "low", "--grow-time", "2", "--grace", "30", *SOON)
    job.wait_world(3, 240)
    (first,) = job.joiners()
    assert fresh.job_field(first, "TimeLimit") == "00:02:00"
    wait_for("the next joiner", lambda: [id for id in job.joiners() if id != first], 150)
    wait_for("three worlds", lambda: job.worlds()[-3:] == [3, 2, 3], 60)
    job.finish()
    assert job.repeated_steps() == 0
    assert {event["reason"] for event in job.job.events("release") + job.job.events("left")} == {"time limit"}
    assert fresh.job_field(first, "JobState") == "COMPLETED"


def test_after_a_site_refuses_joiners_the_job_asks_again_later_and_training_continues(
    steady: Callable[..., Steady], busy: Callable[..., str], fresh: Cluster
) -> None:
    busy("n3", "n4")
    job = steady("--nodes", "2:3", *SOON)
    job.job.wait_state("RUNNING")
    fresh.mini("exec", "--root", "--", "scontrol", "update", "PartitionName=main", "State=DRAIN")
    try:
        problem = job.job.wait_event("growth_problem")
    finally:
        fresh.mini("exec", "--root", "--", "scontrol", "update", "PartitionName=main", "State=UP")
    assert "Required partition not available" in problem["reason"]
    job.wait_world(2)
    wait_for("a joiner after all", job.joiners, 60)
    job.finish()
    assert job.worlds() == [2]


def test_a_spare_steps_in_and_the_job_ends_cleanly(steady: Callable[..., Steady], fresh: Cluster) -> None:
    job = steady("--nodes", "1,2", "--world-multiple-of", "2", "--spares", "1", "--grow-every", "1")
    assert job.job.wait_event("round")["nodes"] == ["n1", "n2"]
    job.wait_world(2)
    (agent,) = fresh.agents("n2")
    os.kill(agent, signal.SIGKILL)
    formed = job.job.wait_event("round", 2)
    (spare,) = {event["node"] for event in job.job.events("join")[:3]} - {"n1", "n2"}  # Slurm chooses the node
    assert formed["nodes"] == ["n1", spare]
    job.wait_all_again()
    wait_for("the next spare", lambda: [event["node"] for event in job.job.events("join")][3:] == ["n2"])
    assert formed["time"] < job.job.wait_event("join", 4)["time"], "the new agent is not waited for"
    job.finish()
    assert job.worlds() == [2, 2]


@ON_DEMAND
def test_a_killed_agent_is_restarted_in_the_same_allocation_and_so_is_every_agent_one_after_another(
    steady: Callable[..., Steady], fresh: Cluster
) -> None:
    """In the end no agent that srun has started is left, but the batch script still waits for the verdict."""
    job = steady("--nodes", "2:3", "--grow-every", "1")
    job.wait_world(3)
    first, second, third = job.job.wait_event("round")["nodes"]
    for restarts, node in enumerate((third, first, second), 1):
        (agent,) = fresh.agents(node)
        os.kill(agent, signal.SIGKILL)
        job.job.wait_event("agent_restart", restarts)
        job.wait_all_again()
    assert [event["node"] for event in job.job.events("agent_restart")] == [third, first, second]
    assert fresh.processes("conclude", first), "the first srun is over"
    job.finish()


@ON_DEMAND
def test_ten_joiners_that_come_together_join_in_one_round() -> None:
    cluster = Cluster(Path("/var/lib/mini-slurm-twelve"))
    cluster.mini("up", "--nodes", "12", "--cpus-per-node", "1", timeout=400)
    try:
        folder = cluster.home / "ten"
        cluster.exec(["mkdir", str(folder)])
        script = shutil.copy(Path(__file__).with_name("steady.py"), folder)
        sleep = ["sbatch", "--parsable", "--nodes=10", "--nodelist=n[3-12]", "--output=/dev/null", "--wrap=sleep 600"]
        other = cluster.exec(sleep, cwd=folder).stdout.strip()
        wait_for("the other job", lambda: cluster.job_field(other, "JobState") == "RUNNING")
        command = [str(Path(sys.executable).with_name("elastic-sbatch")), "--parsable", "--nodes", "2:12", "--grow"]
        id = cluster.exec([*command, str(script)], cwd=folder).stdout.strip()
        job = Steady(Job(cluster, id, folder), folder)
        job.wait_world(2)
        wait_for("ten joiners", lambda: len(job.joiners()) == 10)
        cluster.exec(["scancel", other])
        job.wait_world(12, 240)
        job.finish()
        assert job.worlds() == [2, 12]
        assert job.repeated_steps() == 0
        for record in job.job.events():
            print(record)
    finally:
        cluster.mini("down")
