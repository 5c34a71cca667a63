"""A stock ``torchrun`` with this project's rendezvous: several real torchruns on this machine."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sharedfs import Two
from torch.distributed.elastic.rendezvous import RendezvousParameters

from elastic_hpc.errors import UsageError
from elastic_hpc.network import addresses
from elastic_hpc.network.addresses import listen_from
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.torchrun.handler import _published
from elastic_hpc.torchrun.settings import leads_at_first, place, read_settings
from elastic_hpc.workers.guard import marked

TORCHRUN = Path(sys.executable).with_name("torchrun")
TRAIN = """
import os, signal, subprocess, time
if os.environ["ELASTIC_HPC_ROUND"] == "1" and os.environ["RANK"] == "0":
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open(os.environ["ELASTIC_HPC_RUN_DIR"] + "/left", "w").write(str(left.pid))
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torch's agent alone would wait for 30 s
import torch, torch.distributed as dist
from elastic_hpc.training import report_progress
dist.init_process_group("gloo")
run, rank, round = os.environ["ELASTIC_HPC_RUN_DIR"], dist.get_rank(), os.environ["ELASTIC_HPC_ROUND"]
step, stop = 0, torch.zeros(1)
while not stop:
    total = torch.ones(1)
    dist.all_reduce(total)
    step += 1
    report_progress(step)
    open(f"{run}/stepped.{round}.{rank}", "w").write(f"{os.getpid()} {os.getppid()} {int(total)}")
    time.sleep(0.02)
    stop = torch.tensor([float(os.path.exists(f"{run}/enough"))])
    dist.all_reduce(stop)
dist.destroy_process_group()
"""


class Job:
    """Several torchruns of one job; the first is the endpoint's host."""

    def __init__(self, folder: Path, *, nodes: int, options: tuple[str, ...]) -> None:
        (folder / "train.py").write_text(TRAIN)
        self.run_dir = folder / "elastic-logs" / "digits"
        with listen_from(29700) as free:
            port = free.getsockname()[1]
        self.outputs = [folder / f"output.{node}" for node in range(nodes)]
        self.agents: list[subprocess.Popen[bytes]] = []
        for node, path in enumerate(self.outputs):
            endpoint = ("--rdzv-backend=elastic-hpc", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=digits")
            conf = f"--rdzv-conf=heartbeat_timeout=2,node={node}"
            with path.open("w") as output:
                self.agents.append(
                    subprocess.Popen(
                        [TORCHRUN, *endpoint, conf, *options, "train.py"],
                        cwd=folder,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_for(self, what: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.output()
            time.sleep(0.05)

    def output(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs)

    def stepped(self, round: int, rank: int) -> tuple[int, int, int]:
        """The pid of ``rank``, the pid of its torchrun, and the world size, once the rank has stepped in ``round``."""
        path = self.run_dir / f"stepped.{round}.{rank}"
        self.wait_for(lambda: path.exists() and len(path.read_text().split()) == 3)
        pid, agent, world_size = map(int, path.read_text().split())
        return pid, agent, world_size

    def finish(self) -> list[int]:
        """Wait for the end. Returns the exit codes."""
        (self.run_dir / "enough").touch()
        return self.codes()

    def codes(self) -> list[int]:
        return [agent.wait(timeout=60) for agent in self.agents]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in RunDir(self.run_dir).events() if event["event"] == name]

    def verdict(self) -> dict[str, Any]:
        return RunDir(self.run_dir).read("verdict.json") or {}

    @property
    def processes(self) -> list[int]:
        """The processes of the job except the agents: workers and their children."""
        return marked(f"ELASTIC_HPC_RUN_DIR={self.run_dir}\0".encode())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def do(*options: str, nodes: int) -> Job:
        jobs.append(Job(tmp_path, nodes=nodes, options=options))
        return jobs[-1]

    yield do
    for job in jobs:
        for agent in job.agents:
            agent.kill()
            agent.wait()
        job.wait_for(lambda job=job: not job.processes)


def test_a_crashed_worker_and_then_a_killed_agent_cost_one_round_each(start: Callable[..., Job]) -> None:
    job = start("--nnodes=2:3", "--max-restarts=3", nodes=3)
    pid, _, world_size = job.stepped(1, 2)
    assert world_size == 3
    job.stepped(1, 0)
    assert int((job.run_dir / "left").read_text()) in job.processes
    os.kill(pid, signal.SIGKILL)
    pid, agent, world_size = job.stepped(2, 2)
    assert world_size == 3
    assert int((job.run_dir / "left").read_text()) not in job.processes  # in a session of its own
    (first,) = [event for event in job.events("failure") if event["first"]]
    assert (first["kind"], first["message"], first["rank"]) == ("signal", "killed by SIGKILL", 2)
    os.kill(agent, signal.SIGKILL)
    assert job.stepped(3, 0)[2] == job.stepped(3, 1)[2] == 2
    job.wait_for(lambda: not Path(f"/proc/{pid}").exists())  # the guard has killed the lost agent's worker
    assert sorted(job.finish()) == [-signal.SIGKILL, 0, 0]
    assert (job.verdict()["outcome"], job.verdict()["restarts"]) == ("finished", 2)
    job.wait_for(lambda: not job.processes)


def test_another_torchrun_takes_over_from_the_endpoints_host_and_a_frozen_agent_costs_torchrun_no_restart(
    start: Callable[..., Job],
) -> None:
    job = start("--nnodes=1:3", "--max-restarts=0", nodes=3)
    assert job.stepped(1, 2)[2] == 3
    (formed,) = job.events("round")
    assert formed["leader"] == formed["nodes"][0]
    frozen, agent, _ = job.stepped(1, 0)
    assert agent == job.agents[0].pid
    os.kill(agent, signal.SIGSTOP)  # no connection closes: the other workers hang in their collective
    os.kill(frozen, signal.SIGSTOP)
    job.wait_for(lambda: len(job.events("round")) == 2)
    formed = job.events("round")[1]
    assert (formed["leader"], len(formed["nodes"])) == (formed["nodes"][0], 2)
    assert job.stepped(formed["round"], 0)[2] == job.stepped(formed["round"], 1)[2] == 2
    os.kill(agent, signal.SIGKILL)
    assert job.finish() == [-signal.SIGKILL, 0, 0]
    assert job.verdict()["outcome"] == "finished"
    (restart,) = job.events("restart")
    assert formed["time"] - restart["time"] < 10  # no torchrun waited for workers that ignore SIGTERM
    job.wait_for(lambda: not job.processes)


def test_a_job_below_its_least_number_of_nodes_ends(start: Callable[..., Job]) -> None:
    job = start("--nnodes=2", "--max-restarts=3", nodes=2)
    _, agent, _ = job.stepped(1, 1)
    os.kill(agent, signal.SIGKILL)
    assert job.codes() == [1, -signal.SIGKILL]
    assert "1 nodes are left, fewer than MIN 2; this job cannot be requeued" in job.outputs[0].read_text()
    assert job.verdict()["cause"] == "node lost"


def test_unknown_keys_and_invalid_values_are_refused() -> None:
    def refused(name: str = "7", **config: str) -> str:
        with pytest.raises(UsageError) as error:
            read_settings(RendezvousParameters("elastic-hpc", "n1:29400", name, 1, 2, None, **config))
        return str(error.value)

    assert refused(hearbeat_timeout="5") == (
        "--rdzv-conf hearbeat_timeout=5: expected KEY=VALUE with KEY one of heartbeat_timeout, max_restarts, "
        "interface, join_timeout, last_call_timeout, run_dir, node, is_host, nproc_per_node"
    )
    assert refused(heartbeat_timeout="soon").startswith("--rdzv-conf heartbeat_timeout=soon: expected a time above 0")
    assert refused(node="first") == "--rdzv-conf node=first: expected a whole number, 0 or more"
    assert refused(is_host="maybe") == "--rdzv-conf is_host=maybe: expected true or false"
    assert "'nproc_per_node': 4" in refused(timeout="900")
    assert "for example --rdzv-id $SLURM_JOB_ID" in refused("none")


@pytest.mark.parametrize(
    ("endpoint", "confs"),
    [
        ("localhost:29400", [{"node": "0"}, {"node": "0"}, {"node": "1"}]),
        ("0.0.0.0:29400", [{}, {}, {}]),
        ("127.0.0.9:29400", [{}, {}, {}]),
        (f"{os.uname().nodename}:29400", [{}, {}, {}]),
        ("elsewhere.invalid", [{"is_host": "true"}, {"is_host": "true"}, {"is_host": "false"}]),
    ],
)
def test_exactly_one_torchrun_leads_whatever_the_options_of_each(
    tmp_path: Path, endpoint: str, confs: list[dict[str, str]]
) -> None:
    rundir, firsts = RunDir(tmp_path / "run").create(), []
    for conf in confs:
        parameters = RendezvousParameters("elastic-hpc", endpoint, "7", 1, 3, None, nproc_per_node="1", **conf)
        settings = read_settings(parameters)
        firsts.append(leads_at_first(settings, place(settings, rundir), rundir))
    assert firsts == [True, False, False]


def test_one_torchrun_of_a_job_step_leads_and_again_one_after_the_step_restarts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir, held = RunDir(tmp_path / "run").create(), []
    parameters = RendezvousParameters("elastic-hpc", os.uname().nodename, "7", 1, 3, None, nproc_per_node="1")
    envs = [AgentEnv("7", node, f"n{node}", 3, 0, 1, None, None, local=False) for node in (2, 1)]

    def lock(path: Path) -> bool:
        held.append(os.open(path, os.O_RDWR | os.O_CREAT))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    monkeypatch.setattr("elastic_hpc.torchrun.settings._lock", lock)
    for _ in range(2):
        assert [leads_at_first(read_settings(parameters), env, rundir) for env in envs] == [True, False]
        while held:  # their processes end
            os.close(held.pop())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")
def test_a_restarted_torchrun_follows_a_leader_that_nfs_has_not_shown_it_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Two(tmp_path)
    two.server.behave(names_s=600)
    monkeypatch.setattr("elastic_hpc.torchrun.settings._lock", lambda _: True)
    settings = read_settings(RendezvousParameters("elastic-hpc", "", "7", 1, 3, None, nproc_per_node="1", node="0"))
    rundir, leader, over = RunDir(two.b), RunDir(two.a), threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            leader.beat()

    try:
        assert leads_at_first(settings, place(settings, rundir), rundir)
        leader.write("endpoint.json", {"run": 0})
        beats = threading.Thread(target=beat)
        beats.start()
        assert not leads_at_first(settings, place(settings, rundir), rundir)
        over.set()
        beats.join()
    finally:
        over.set()
        two.server.close()


def test_a_single_torchrun_listens_on_loopback_and_several_listen_on_reachable_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "to_publish", lambda *_: ("10.1.0.7",))
    by_hand = AgentEnv("7", 0, "n1", 3, 0, 1, None, None, local=True)

    def published(endpoint: str, most: int, given: str | None = None, **place: Any) -> tuple[str, ...]:
        parameters = RendezvousParameters("elastic-hpc", endpoint, "7", 1, most, given, nproc_per_node="1")
        return _published(read_settings(parameters), replace(by_hand, **place), given)

    assert published("localhost:29400", 1) == published("", 1) == ("127.0.0.1",)
    assert published("localhost:29400", 3) == published("localhost:29400", 1, local=False) == ("10.1.0.7",)
    assert published("n1", 3, "localhost") == ("127.0.0.1",)
