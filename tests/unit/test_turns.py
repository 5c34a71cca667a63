"""Many nodes are lost at once: a remaining majority continues, otherwise one agent acts for all, and later the next
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated
from simulated import Job

from elastic_hpc import slurm
from elastic_hpc.agent import turns
from elastic_hpc.agent.leading import Leading
from elastic_hpc.errors import ElasticError, JobEnded, SlurmError
from elastic_hpc.membership.election import Base
from elastic_hpc.membership.leaderless import LEADERLESS
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv

POLICY = replace(simulated.POLICY, heartbeat_timeout=0.0)
ENVIRON = {"SLURM_JOB_ID": "7"}


async def no_store(round: int) -> int:
    raise AssertionError(f"nobody forms round {round}")


class Survivors:
    """Agents on ``n1``, ``n2`` and so on that have lost their leader, and a Slurm that records the steps that it
    starts.
    """

    def __init__(self, path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.rundir = RunDir(path)
        self.steps: list[str] = []
        self.commands: list[list[str]] = []
        self.refuses: set[str] = set()
        """Nodes on which Slurm cannot start a step."""
        self.agents = {f"n{index}": self._agent(index, count) for index in range(1, count + 1)}
        monkeypatch.setattr(slurm, "start_step", self._start_step)
        monkeypatch.setattr(turns.time, "monotonic", lambda: self.now)

    def _agent(self, index: int, count: int) -> Leading:
        env = AgentEnv("7", index, f"n{index}", count, 0, 1, None, None, local=False)
        host = Host(index, f"n{index}", (f"10.0.0.{index}",), 29432)
        return Leading(LaunchSpec("train.py"), env, host, 1, POLICY, self.rundir, ENVIRON, no_store, None)  # type: ignore[arg-type]

    def _start_step(self, _job: str, node: str, command: Sequence[str], *_: Any) -> None:
        self.steps.append(node)
        self.commands.append(list(command))
        if node in self.refuses:
            raise SlurmError(f"srun: {node} does not answer")

    def look(self, name: str, **how: Any) -> JobEnded | None:
        """Let the agent on ``name`` check once what to do."""
        roster = Roster(4, (self.agents[name].host,), (Base(4, 0, (0, 1)),), 0, 0)
        return self.agents[name].give_up(roster, 99.0, "n0 lost", **{"patient": False, **how})

    def left(self, others: tuple[str, ...] = ()) -> list[str]:
        """Let all agents check once. Returns those that leave."""
        return [name for name in self.agents if self.look(name, others=others)]


@pytest.fixture
def survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Survivors]:
    return lambda count: Survivors(tmp_path, count, monkeypatch)


def test_one_of_four_hundred_agents_acts_and_the_others_leave(survivors: Callable[[int], Survivors]) -> None:
    job = survivors(400)
    assert len(job.left(others=("n2", "n3", "n4"))) == 400
    assert job.steps == ["n1", "n2"], "a step, and its deputy"
    assert all("--unless-led" in command for command in job.commands)
    assert [event["event"] for event in job.rundir.events()] == ["verdict"]


def test_a_patient_agent_leaves_too_when_another_has_acted(survivors: Callable[[int], Survivors]) -> None:
    job = survivors(2)
    assert job.look("n2", patient=True) is None
    assert job.look("n1", others=("n2",))
    assert job.look("n2", patient=True)


def test_without_a_deputy_the_other_agents_stay_and_the_next_one_acts_later(
    survivors: Callable[[int], Survivors],
) -> None:
    job = survivors(400)
    assert job.left() == ["n1"]
    del job.agents["n1"]
    for turn in range(2, 5):
        for _ in range(5):
            assert job.left() == []
            job.now += turns.TURN / 5 - 1
        job.now += 10
        assert job.left() == [f"n{turn}"]
        del job.agents[f"n{turn}"]
    assert job.steps == ["n1", "n2", "n3", "n4"]


def test_an_agent_that_acts_in_vain_retries_later_and_then_another_agent_acts(
    survivors: Callable[[int], Survivors],
) -> None:
    job = survivors(400)
    job.refuses = {"n1", "n2"}
    for _ in range(60):
        assert job.left() == []
        job.now += 1.0
    assert set(job.steps) == {"n1"}
    assert len(job.steps) <= 3
    for _ in range(60):
        assert job.left() == []
        job.now += 1.0
    assert len(job.steps) <= 7
    assert len(job.left(others=("n9",))) == 398, "all that look after n3, whose turn it is, and that has a deputy"
    assert job.steps[-2:] == ["n3", "n9"]
    assert len(job.left()) == 400


def test_a_node_on_which_no_deputy_can_start_is_skipped(survivors: Callable[[int], Survivors]) -> None:
    job = survivors(1)
    job.refuses = {"n2"}
    assert job.left(others=("n2", "n3", "n4")) == ["n1"]
    assert job.steps == ["n1", "n2", "n3"]


def test_an_agent_acts_even_if_the_run_directory_cannot_be_written(
    survivors: Callable[[int], Survivors], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bool:
        raise ElasticError("read-only file system")

    monkeypatch.setattr(RunDir, "claim", refuse)
    job = survivors(1)
    assert job.left() == ["n1"]
    assert job.steps == ["n1"]


def test_no_agent_acts_when_there_is_a_leader_again(survivors: Callable[[int], Survivors]) -> None:
    """There is a leader by the time that a stalled file system answers."""
    job = survivors(1)
    assert job.look("n1", is_led=lambda: True) is None
    assert job.rundir.read("verdict.json") is None
    assert job.steps == []


def test_the_agents_do_not_act_again_if_their_leader_has_acted(survivors: Callable[[int], Survivors]) -> None:
    job = survivors(3)
    verdict = {"run": 0, "outcome": "requeue", "reason": "n0 lost", "actor": "agents"}
    job.rundir.write("verdict.json", verdict)
    assert job.agents["n1"]._ending.act(verdict, [], alone=True, others=["n2", "n3"]) is None
    del job.agents["n1"]
    assert job.left() == ["n2", "n3"]
    assert job.steps == ["n1", "n2"]
    assert not any("--unless-led" in command for command in job.commands), "a majority has agreed"


def test_a_continued_run_starts_with_the_first_turn(survivors: Callable[[int], Survivors]) -> None:
    job = survivors(2)
    job.left(others=("n2",))
    job.rundir.forget_verdict()
    assert [path.name for path in job.rundir.path.iterdir() if path.name.startswith(("turn", "acts", "verd"))] == []


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_an_agent_that_requests_a_majority_in_vain_acts_for_the_agents_connected_to_it(
    seed: int, *, files: bool
) -> None:
    """Also if the run directory does not answer, so that no agent can learn of it there."""
    job = Job(seed, 9, replace(simulated.POLICY, max_nodes=9))

    async def story() -> None:
        assert await job.until(job.training, 100)
        job.loss, job.files = 0.0, files
        for node in job.nodes[:5]:
            node.power_off()
        await job.until(lambda: bool(job.acted), 120)
        await job.until(lambda: False, 30)
        ((index, others),) = job.acted
        assert index == 5
        assert others
        assert set(others) <= {"n6", "n7", "n8"}
        assert all(node.left for node in job.nodes[5:]) == files

    job.run(story)


@pytest.mark.parametrize("seed", range(5))
def test_a_verdict_without_a_majority_does_not_end_a_job_that_a_majority_continues(seed: int) -> None:
    """A node that is cut off sees no heartbeat of the leader, because the leader's file system answers late."""
    job = Job(seed, 4, simulated.POLICY)

    async def story() -> None:
        assert await job.until(job.training, 100)
        job.loss, job.stalls = 0.0, True
        job.cut([3])
        assert await job.until(lambda: bool(job.acted), 120)
        assert job.verdict
        assert job.verdict["outcome"] == "requeue"
        assert await job.until(job.training, 30)
        assert [node.index for node in job.left] == [0, 1, 2]
        job.stalls = False
        assert await job.until(lambda: job.verdict is None, 10)
        assert not job.acted, "the others would leave, as somebody acts for them"
        for node in job.left:
            node.end_workers(failed=False)
        assert await job.until(job.over, 30)
        assert job.verdict
        assert job.verdict["outcome"] == "finished"

    job.run(story)


def test_the_next_node_takes_over_when_all_nodes_of_some_racks_have_lost_power() -> None:
    """Asking so many silent nodes one by one would take longer than the other nodes wait."""
    job = Job(1, 100, replace(simulated.POLICY, min_nodes=1, max_nodes=100))

    async def story() -> None:
        assert await job.until(job.training, 100)
        job.loss = 0.0
        for node in job.nodes[:48]:
            node.power_off()
        assert await job.until(lambda: any(name == "take_over" for _, _, name, _ in job.events), 30)
        assert await job.until(job.training, 10)
        assert not job.acted

    job.run(story)


def test_a_leader_that_continues_removes_the_files_that_agents_have_written_for_a_verdict_without_it(
    tmp_path: Path,
) -> None:
    rundir = RunDir(tmp_path / "run").create()
    rundir.write("verdict.json", {"run": 0, "outcome": "requeue", "actor": LEADERLESS})
    agent = turns.Turns(rundir, 0, "n3")
    assert agent.take()
    for name in ("acts.0", "acts.1", "turn.1.1"):
        rundir.claim(name, "n3")
    assert (rundir.withdraw(0) or {})["outcome"] == "requeue"
    assert {path.name for path in rundir.path.glob("*.[01]*")} == {"acts.1", "turn.1.1"}
    agent.done(lambda: rundir.verdict(0) is not None)
    assert not agent.are_done(), "the verdict was withdrawn while the agent acted"
    rundir.claim("acts.0", "n3")  # the same, a moment later
    assert rundir.withdraw(0) is None
    assert not agent.are_done()


def test_a_leader_removes_no_file_of_a_verdict_that_a_majority_has_agreed_to(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run").create()
    rundir.write("verdict.json", {"run": 0, "outcome": "requeue", "actor": "agents"})
    rundir.claim("acts.0", "n3")
    assert rundir.withdraw(0) is None
    assert rundir.verdict(0)
    assert (rundir.path / "acts.0").exists()
