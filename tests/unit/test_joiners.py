"""Joiners and restarted agents: how they enter, are released, and are waited for."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cluster import Cluster, Node, end_of, wait_for

from elastic_hpc import slurm
from elastic_hpc.agent import conclude
from elastic_hpc.agent.joiners import SlurmSource, enter
from elastic_hpc.environment import AGAIN, JOIN, prepare_worker_env
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.membership.nodes import joiner, votes
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Link
from elastic_hpc.network.client import ask_to_leave
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import read_agent_env
from elastic_hpc.workers import folder

TASK = {
    "SLURM_JOB_ID": "4712",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "n5",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
}


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run").create()
    made.write("spec.json", {"job": "4711", "--heartbeat-timeout": "0.5"})
    made.write("endpoint.json", {"run": 1, "node": 0, "host": "n1", "addresses": ["127.0.0.1"], "port": 1})
    return made


@pytest.fixture
def grown(tmp_path: Path) -> Iterator[tuple[Cluster, Node]]:
    """A job of one own node, which leads, and a joiner."""
    cluster = Cluster(tmp_path, granted=1, grow_every=0.0)
    cluster.seats()
    cluster.nodes.append(Node(cluster, joiner("4712"), first=False))
    yield cluster, cluster.nodes[1]
    cluster.close()


def test_a_joiner_is_numbered_by_its_job_and_a_restarted_agent_keeps_its_index() -> None:
    first, joins = read_agent_env(TASK), read_agent_env({**TASK, JOIN: "/run"})
    again = read_agent_env({**TASK, AGAIN: "3"})
    assert [(env.node, env.late, env.joins) for env in (first, joins, again)] == [
        (0, False, False),
        (joiner("4712"), True, True),
        (3, True, False),
    ]


def test_jobs_that_workers_submit_do_not_become_joiners() -> None:
    environ = {**TASK, JOIN: "/run", AGAIN: "3"}
    prepare_worker_env(environ, read_agent_env(TASK).cpus, 1, "token")
    assert not {JOIN, AGAIN} & environ.keys()


def test_a_joiner_of_an_ended_job_leaves_immediately(rundir: RunDir) -> None:
    env = read_agent_env({**TASK, JOIN: str(rundir.path)})
    for run in (1, 2):
        rundir.write("verdict.json", {"run": run, "outcome": "requeue", "reason": "2 nodes are left"})
        with pytest.raises(JobEnded, match="the job has ended: 2 nodes are left"):
            enter(env, rundir)


def test_a_joiner_reports_where_it_has_found_no_job(tmp_path: Path) -> None:
    with pytest.raises(ElasticError, match="no job has been started there"):
        enter(read_agent_env({**TASK, JOIN: str(tmp_path)}), RunDir(tmp_path))


def test_the_batch_script_of_a_joiner_does_not_act_on_a_verdict(rundir: RunDir) -> None:
    rundir.write("verdict.json", {"run": 0, "outcome": "requeue", "reason": "time limit"})
    assert conclude.conclude(rundir, {**TASK, JOIN: str(rundir.path)}, 0) == 0


def test_at_the_end_of_a_job_joiners_that_have_started_leave_and_only_the_others_are_cancelled(
    rundir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING")
    listed = "".join(f"{id}|{state}||(null)|10:00|None\n" for id, state in enumerate(states, 11))
    for name, body in (("squeue", f"printf '{listed}'"), ("scancel", f'echo "$*" >> {tmp_path}/cancelled')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rundir.write("spec.json", {"job": "4711", "--grow": "on"})
    rundir.write("verdict.json", {"run": 0, "outcome": "failed", "reason": "", "failure": None})
    assert conclude.conclude(rundir, TASK, 0) == 1
    assert (tmp_path / "cancelled").read_text() == "11 13\n"


def test_a_joiner_trains_and_is_released_on_request(grown: tuple[Cluster, Node]) -> None:
    cluster, joins = grown
    own = cluster.nodes[0]
    own.train(1)
    assert own.control.must_stop(1) is None
    wait_for(lambda: own.control.must_stop(1))
    seats = cluster.seats()
    assert [seat.plan.group_world_size for seat in seats] == [2, 2]
    assert own.leader
    assert [base.members for base in own.leader.roster.bases] == [(0,)]
    ask_to_leave(cluster.rundir, joins.host.node, "time limit")
    wait_for(lambda: own.control.must_stop(2))
    own.control.report("idle", 2)
    end = end_of(joins.control, 2)
    assert "time limit" in end.reason
    assert not end.logged, "the agent says itself why it leaves"
    assert own.control.next_seat().plan.group_world_size == 1
    wait_for(lambda: cluster.events("release"))
    assert cluster.events("lost") == []


def test_a_joiner_whose_leader_is_gone_never_leads(grown: tuple[Cluster, Node]) -> None:
    cluster, joins = grown
    cluster.nodes[0].train(1)
    wait_for(lambda: cluster.nodes[0].control.must_stop(1))
    cluster.seats()
    cluster.nodes[0].die()
    wait_for(lambda: joins.gave_up)
    assert joins.leader is None
    assert not votes(joins.host.node)


async def no_dial(_host: Host) -> Link:
    raise asyncio.TimeoutError


def test_commands_that_slurm_starts_find_a_recreated_working_directory(
    rundir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, env, started = tmp_path / "work", read_agent_env(TASK), list[str]()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(folder, "_remembered", "")
    folder.remember()

    def start(*_: object, **__: object) -> str:
        started.append(os.getcwd())
        return "4713"

    for name in ("start_agent", "start_step", "submit_joiner"):
        monkeypatch.setattr(slurm, name, start)
    monkeypatch.setattr(slurm, "show_job", lambda _: SimpleNamespace(nodes="n5"))
    monkeypatch.setattr(slurm, "expand", lambda nodes: (nodes,))
    (rundir.path / "script.sbatch").write_text(JOIN)
    source = SlurmSource(env, rundir, TASK, no_dial)
    host, verdict = Host(1, "n5", ("127.0.0.1",), 1), {"outcome": "requeue", "reason": ""}
    for ask in (
        lambda: asyncio.run(source.restart(host)),
        lambda: asyncio.run(source.submit(())),
        lambda: conclude.act(rundir, env, verdict, (), environ=TASK, alone=True, others=()),
    ):
        work.rmdir()
        work.mkdir()
        ask()
    assert started == [str(work)] * 3


def test_a_node_lacks_an_agent_if_the_node_answers_and_no_process_listens_there(rundir: RunDir) -> None:
    source = SlurmSource(read_agent_env(TASK), rundir, TASK, no_dial)
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = Host(1, "n2", ("127.0.0.1",), server.getsockname()[1])
        assert not asyncio.run(source.lacks_agent(host)), "an agent that stands still"
    assert asyncio.run(source.lacks_agent(host))


def test_the_leader_knows_whether_the_process_at_an_agents_port_is_that_agent(tmp_path: Path) -> None:
    cluster, other = Cluster(tmp_path / "this", granted=2), Cluster(tmp_path / "other", granted=1)
    leader = cluster.nodes[0]
    source = SlurmSource(read_agent_env(TASK), cluster.rundir, TASK, leader.network.dial)

    def lacks(host: Host) -> bool:
        assert leader.control._loop
        return asyncio.run_coroutine_threadsafe(source.lacks_agent(host), leader.control._loop).result(timeout=10)

    lost = cluster.nodes[1].host
    assert not lacks(lost)
    assert not lacks(replace(lost, port=leader.host.port)), "the address leads to this agent itself"
    assert lacks(replace(lost, port=other.nodes[0].host.port)), "the agent of another job has that port now"
    cluster.close()
    other.close()


def test_a_leader_does_not_query_an_address_that_its_own_node_has_too(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SlurmSource(read_agent_env(TASK), rundir, TASK, no_dial)
    asked: list[str] = []

    async def answers(address: str, _port: int) -> bool | None:
        asked.append(address)
        return None if address == "10.0.0.2" else address == "172.17.0.1"

    monkeypatch.setattr("elastic_hpc.agent.joiners._answers", answers)
    monkeypatch.setattr(addresses, "own", lambda hosts: [host for host in hosts if host in ("10.0.0.1", "172.17.0.1")])
    for second in (
        "172.17.0.1",
        "10.0.0.1",
    ):  # behind the second address is the agent of the leader's own node, or no process
        assert not asyncio.run(source.lacks_agent(Host(1, "n2", ("10.0.0.2", second), 1)))
    assert set(asked) == {"10.0.0.2"}


def test_conclude_waits_for_the_verdict_as_long_as_a_leader_is_active(rundir: RunDir) -> None:
    turns = threading.Semaphore(0)
    verdict = {"run": 1, "outcome": "finished", "reason": "all workers finished"}

    def lead() -> None:
        for _ in range(5):  # for longer than conclude would wait in silence
            turns.acquire()
            rundir.write("endpoint.json", {"run": 1, "node": 2, "host": "n3", "addresses": [], "port": 1})
        rundir.write("verdict.json", verdict)

    leading = threading.Thread(target=lead)
    leading.start()
    assert conclude.await_verdict(rundir, 1, turns.release) == verdict
    leading.join()


def test_conclude_does_not_wait_for_a_verdict_without_a_leader_or_under_another_run(rundir: RunDir) -> None:
    assert conclude.await_verdict(rundir, 1, lambda: None) is None
    assert conclude.await_verdict(rundir, 2, pytest.fail) is None
