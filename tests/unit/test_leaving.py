"""Nothing keeps an ended job: no frozen agent, no process that cannot be killed, no waiting thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster import Cluster, wait_for
from torch.distributed.elastic.multiprocessing import SignalException

from elastic_hpc.agent import bridge
from elastic_hpc.cli import agents
from elastic_hpc.errors import JobEnded
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.workers import elastic_agent
from elastic_hpc.workers.elastic_agent import ElasticAgent
from elastic_hpc.workers.lives import Lives

FREEZER = Path("/sys/fs/cgroup/freezer")
needs_freezer = pytest.mark.skipif(
    not os.access(FREEZER / "tasks", os.W_OK), reason="needs cgroup v1's freezer, as root"
)


@pytest.fixture
def unkillable() -> Iterator[subprocess.Popen[bytes]]:
    """A process that no signal ends because its cgroup is frozen; it acts like a process that waits for a device."""
    group = FREEZER / f"elastic-hpc-test-{os.getpid()}"
    group.mkdir()
    process = subprocess.Popen(
        ["sleep", "600"], start_new_session=True, env={**os.environ, "ELASTIC_HPC_AGENT": "a-test.token"}
    )
    (group / "tasks").write_text(str(process.pid))
    (group / "freezer.state").write_text("FROZEN")
    wait_for(lambda: (group / "freezer.state").read_text() == "FROZEN\n")
    yield process
    process.kill()
    (group / "freezer.state").write_text("THAWED")
    process.wait(10)
    wait_for(lambda: not (group / "tasks").read_text())
    group.rmdir()


class Agent:
    """The part of an ``ElasticAgent`` that kills, with the workers ``pids``."""

    def __init__(self, *pids: int) -> None:
        self.told: list[str] = []
        self.strikes: list[str] = []
        self.ends: JobEnded | None = JobEnded("finished", "the others have finished")
        self.agent: Any = ElasticAgent.__new__(ElasticAgent)
        self.agent._pidfds = {pid: os.pidfd_open(pid) for pid in pids}
        self.agent._given_up, self.agent._received = False, None
        self.agent._mark = b"ELASTIC_HPC_AGENT=a-test.token\0"
        self.agent._standbys, self.agent._lives = SimpleNamespace(waiting=set()), Lives("")
        self.agent._strike = self.strikes.append
        self.agent._control = SimpleNamespace(report_unfit=self.told.append, must_stop=self._must_stop)
        self.agent._worker_group = SimpleNamespace(spec=SimpleNamespace(rdzv_handler=SimpleNamespace(round=1)))
        self.agent._wait_for_news = lambda: None

    def _must_stop(self, _round: int) -> str:
        if self.ends:
            raise self.ends
        return "the round is over"

    def close(self) -> None:
        for pidfd in self.agent._pidfds.values():
            os.close(pidfd)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_agent, "_KILL_TIMEOUT", 0.5)
    monkeypatch.setattr(elastic_agent, "_LEAVE_TIMEOUT", 0.5)
    monkeypatch.setattr(agents, "_LEAVE", 0.5)
    monkeypatch.setattr(agents, "_LAST", 0.5)
    monkeypatch.setattr(agents, "_TICK", 0.1)


@needs_freezer
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("grandchild", [False, True])
def test_a_node_whose_worker_cannot_be_killed_is_given_up_and_leaves_with_the_job(
    unkillable: subprocess.Popen[bytes], *, grandchild: bool
) -> None:
    worker = subprocess.Popen(["true"])
    agent = Agent(worker.pid if grandchild else unkillable.pid)
    with pytest.raises(JobEnded, match="the others have finished"):
        agent.agent._kill_workers()
    (told,) = agent.told
    assert told == f"could not be killed within 0.5 s: sleep (pid {unkillable.pid}, state D)"
    assert agent.strikes == [], "the leader makes the strike"
    began = time.monotonic()
    agent.agent._kill_workers(leaving=True)  # torch calls shutdown again
    assert time.monotonic() - began < 0.4, "it has waited once"
    agent.close()
    worker.wait()


@needs_freezer
@pytest.mark.usefixtures("quick")
def test_an_agent_that_leaves_waits_briefly_for_unkillable_processes_and_makes_the_requeue_avoid_its_node(
    unkillable: subprocess.Popen[bytes],
) -> None:
    agent = Agent(unkillable.pid)
    agent.agent._kill_workers(leaving=True)
    assert (agent.told, len(agent.strikes)) == ([], 1)
    agent.close()


@needs_freezer
@pytest.mark.usefixtures("quick")
def test_a_node_that_was_given_up_leaves_at_a_signal(unkillable: subprocess.Popen[bytes]) -> None:
    agent = Agent(unkillable.pid)
    agent.ends, agent.agent._received = None, (SignalException("got SIGTERM", signal.SIGTERM), 0.0)
    with pytest.raises(SignalException):
        agent.agent._kill_workers()
    agent.close()


def test_the_agent_does_not_wait_for_dying_workers() -> None:
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    agent = Agent(worker.pid)
    began = time.monotonic()
    agent.agent._kill_workers()
    assert time.monotonic() - began < 5
    assert worker.wait() == -signal.SIGKILL
    agent.close()


def test_a_main_thread_that_does_not_follow_the_leaders_orders_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "STOP_TIMEOUT", 1.5)
    cluster = Cluster(tmp_path)
    try:
        cluster.seats()
        for node in cluster.nodes:
            node.train(1)
        stuck: list[int] = []
        for node in cluster.nodes:
            monkeypatch.setattr(node.control, "_on_stuck", lambda node=node: stuck.append(node.host.node))
        cluster.nodes[2].die()
        cluster.wait_stop(1)
        seat = cluster.nodes[
            0
        ].control.next_seat  # node 1's main thread hangs: it never reports that its workers have stopped
        with ThreadPoolExecutor(1) as threads:
            seated = threads.submit(seat)
            wait_for(lambda: stuck)
            assert set(stuck) == {1}
            cluster.nodes[1].control.next_seat()
            seated.result(timeout=20)
    finally:
        cluster.close()


@pytest.fixture
def handlers_return() -> Iterator[None]:
    """Restore the signal handlers of this process after the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


FROZEN_AGENT = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
DEAF_AGENT = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


@pytest.mark.usefixtures("quick", "handlers_return")
@pytest.mark.parametrize("code", [FROZEN_AGENT, DEAF_AGENT])
def test_elastic_srun_ends_agents_that_have_not_left_long_after_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    rundir = RunDir(tmp_path)
    run = agents.Agents(rundir, [([sys.executable, "-c", code], dict(os.environ)), (["true"], {})])
    rundir.write("verdict.json", {"outcome": "finished"})
    run.wait()
    assert [process.returncode for process in run._processes] == [-signal.SIGKILL, 0]
    assert "after the verdict not all agents have left: they are ended" in capsys.readouterr().err


@needs_freezer
@pytest.mark.usefixtures("quick", "handlers_return")
def test_elastic_srun_does_not_wait_for_unkillable_processes(
    tmp_path: Path, unkillable: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    rundir = RunDir(tmp_path)
    run = agents.Agents(rundir, [])
    run._processes = [unkillable]
    rundir.write("verdict.json", {"outcome": "finished"})
    run.wait()
    assert "agents that cannot be killed are left behind" in capsys.readouterr().err


@pytest.mark.usefixtures("handlers_return")
def test_without_a_verdict_elastic_srun_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "_LEAVE", 0.2)
    monkeypatch.setattr(agents, "_TICK", 0.1)
    run = agents.Agents(RunDir(tmp_path), [(["sleep", "1.5"], dict(os.environ))])
    run.wait()
    assert [process.returncode for process in run._processes] == [0]


@pytest.mark.usefixtures("handlers_return")
def test_a_signal_that_a_wrapper_forwards_again_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``timeout 8h elastic-srun ...`` sends SIGTERM to elastic-srun, and then to its process group."""
    asked: list[int] = []
    monkeypatch.setattr(agents.Agents, "_stop", lambda _self, count: asked.append(count))
    run = agents.Agents(RunDir(tmp_path), [])
    for moment, number in [(10, 15), (10.1, 15), (10.4, 2), (10.5, 2), (10.8, 2), (11, 2)]:
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: moment)
        signal.raise_signal(number)
    run.handle_signals()
    assert asked == [1, 2, 3], "SIGTERM, Ctrl-C, and Ctrl-C again"
    assert run.interrupted
