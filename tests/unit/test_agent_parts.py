"""The parts of an agent: its environment, its addresses, the run directory, its actions without a leader."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated
import torch
from cluster import wait_for

import elastic_hpc
from elastic_hpc import slurm
from elastic_hpc.agent.arguments import workers_per_node
from elastic_hpc.agent.assembly import _software
from elastic_hpc.agent.conclude import conclude
from elastic_hpc.agent.leading import Leading
from elastic_hpc.environment import NODES, for_a_new_job, is_of_another_job, prepare_worker_env
from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.election import Base
from elastic_hpc.membership.leaderless import LEADERLESS
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.network import addresses
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import add_launch_options
from elastic_hpc.options.values import Endpoint
from elastic_hpc.record.endpoint import Published
from elastic_hpc.record.events import append_event
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv, read_agent_env

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n2",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def test_an_agent_finds_its_place_in_slurms_environment() -> None:
    env = read_agent_env({**STEP, "SLURM_RESTART_COUNT": "2", "SLURM_GPUS_ON_NODE": "4"})
    assert (env.job, env.node, env.name, env.nodes, env.run, env.gpus) == ("7", 1, "n2", 3, 2, 4)
    assert env.cpus <= 2


def test_the_node_of_an_agent_in_an_oci_container_is_found_by_the_name_of_its_host() -> None:
    host = os.uname().nodename.partition(".")[0]
    env = read_agent_env({**STEP, NODES: f"n1\nn2\n{host}"})
    assert (env.node, env.name) == (2, host)
    env = read_agent_env({**STEP, NODES: "n1\nn2\nn3"})  # the container has a host name of its own
    assert (env.node, env.name) == (1, "n2")


def test_an_array_task_has_the_same_name_as_in_scontrol() -> None:
    assert read_agent_env({**STEP, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}).job == "5_3"


def test_several_agents_on_a_node_are_refused_with_the_option_to_use() -> None:
    with pytest.raises(ElasticError, match=r"6 agents on 3 nodes.*--ntasks-per-node=1"):
        read_agent_env({**STEP, "SLURM_STEP_NUM_TASKS": "6"})


def test_outside_slurm_the_error_shows_what_to_type() -> None:
    with pytest.raises(ElasticError, match=r"SLURM_JOB_ID is not set.*elastic-srun --standalone"):
        read_agent_env({})


@pytest.mark.parametrize(
    ("wanted", "granted", "visible", "expected"),
    [
        (None, 4, 0, 4),
        (None, 0, 0, 1),
        (None, None, 2, 2),
        ("auto", 0, 0, 16),
        ("auto", 2, 8, 2),
        ("cpu", 4, 4, 16),
        ("gpu", None, 3, 3),
        ("5", 4, 4, 5),
    ],
)
def test_the_number_of_workers(wanted: str | None, granted: int | None, visible: int, expected: int) -> None:
    env = AgentEnv("7", 0, "n1", 1, 0, 16, granted, None, local=False)
    assert workers_per_node(wanted, env, lambda: visible) == expected


def test_gpu_workers_without_a_gpu_are_refused() -> None:
    env = AgentEnv("7", 0, "n1", 1, 0, 16, 0, None, local=False)
    with pytest.raises(ElasticError, match=r"n1 has no GPU granted.*--gpus-per-node"):
        workers_per_node("gpu", env, lambda: 0)


def test_workers_do_not_see_that_slurm_launched_the_agents() -> None:
    environ = {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "3"}
    prepare_worker_env(environ, 9, 2, "token")
    assert not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID"} & environ.keys()
    assert environ["SLURM_JOB_ID"] == "7"
    assert environ["OMP_NUM_THREADS"] == "4"
    kept = {"OMP_NUM_THREADS": "3"}
    prepare_worker_env(kept, 9, 2, "token")
    assert kept["OMP_NUM_THREADS"] == "3", "what the user set is kept"


SHAPE = {
    "SLURM_NNODES": "3", "SLURM_JOB_NUM_NODES": "3", "SLURM_NODELIST": "n[1-3]", "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_JOB_CPUS_PER_NODE": "9(x3)", "SLURM_JOB_CPUS_PER_NODE_PACK_GROUP_0": "9(x3)",
    "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_NTASKS_PER_SOCKET": "1", "SLURM_GPUS": "12", "SLURM_CPU_BIND_LIST": "0x1",
    "PMI_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_SERVER_URI41": "x", "OMPI_COMM_WORLD_SIZE": "3",
    "MV2_COMM_WORLD_RANK": "1", "MPI_LOCALRANKID": "0", "PALS_RANKID": "1",
}  # fmt: skip
"""Variables that describe the granted nodes, including spares and dead nodes, and the agents as tasks of MPI."""


def test_workers_see_only_the_size_of_their_world() -> None:
    facts = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "9", "SLURM_GPUS_ON_NODE": "4", "SLURMD_NODENAME": "n2"}
    settings = {"OMPI_MCA_btl": "self,tcp", "PMIX_MCA_gds": "hash", "SLURM_CPUS_PER_TASK": "9", "PMIGHTY": "1"}
    environ = {**STEP, **SHAPE, **facts, **settings}
    prepare_worker_env(environ, 9, 2, "7.token")
    assert not SHAPE.keys() & environ.keys()
    assert {**environ, **facts, **settings} == environ


def test_a_job_that_a_worker_submits_or_starts_is_separate_from_the_workers_job() -> None:
    agent = AgentEnv("9", 1, "n2", 3, 1, 9, None, None, local=False)
    goes_on = {**STEP, "ELASTIC_HPC_CONTINUE": "/run", "ELASTIC_HPC_FIRST_RUN": "1", "ELASTIC_HPC_FIRST_JOB": "7"}
    outer = {**goes_on, "ELASTIC_HPC_LOCAL_NODE": "0", "ELASTIC_HPC_LOCAL_NODES": "2", "NCCL_SOCKET_IFNAME": "ib1"}
    prepare_worker_env(outer, agent.cpus, 3, "9.outer", run_dir="/run", live="/live", interface="ib0")
    assert {name for name in outer if name.startswith("ELASTIC_HPC_")} == {
        "ELASTIC_HPC_AGENT", "ELASTIC_HPC_FENCE", "ELASTIC_HPC_GIVEN", "ELASTIC_HPC_LIVE", "ELASTIC_HPC_LOCAL_DIR",
        "ELASTIC_HPC_RANK0_ADDR", "ELASTIC_HPC_ROUND", "ELASTIC_HPC_RUN_DIR",
    }  # fmt: skip
    outer |= {"GLOO_SOCKET_IFNAME": "eth3", "ELASTIC_HPC_ROUND": "4", "ELASTIC_HPC_CONFIG": "mine.toml"}
    inner = for_a_new_job(outer)
    assert "ELASTIC_HPC_LIVE" not in inner, "its agent does not know the workers of that job"
    prepare_worker_env(inner, 4, 1, "9.inner")
    assert (inner["OMP_NUM_THREADS"], inner["NCCL_SOCKET_IFNAME"], inner["GLOO_SOCKET_IFNAME"]) == ("4", "ib1", "")
    assert (inner["ELASTIC_HPC_ROUND"], inner["ELASTIC_HPC_AGENT"]) == ("", "9.inner")
    assert inner["ELASTIC_HPC_CONFIG"] == "mine.toml"
    said = for_a_new_job({**outer, "OMP_NUM_THREADS": "8"})  # set by the script, or by a line of the inner job's script
    prepare_worker_env(said, agent.cpus, 1, "9.inner")
    assert said["OMP_NUM_THREADS"] == "8"


def test_a_job_ignores_the_variables_that_it_inherits_from_the_worker_that_submitted_it() -> None:
    worker = {"SLURM_JOB_ID": "7", "ELASTIC_HPC_AGENT": "7.token"}
    assert [
        is_of_another_job(environ)
        for environ in (
            {**worker, "SLURM_JOB_ID": "8"},
            worker,
            {"ELASTIC_HPC_AGENT": "7.token"},
            {"SLURM_JOB_ID": "8", "ELASTIC_HPC_AGENT": ".token"},
            {"SLURM_JOB_ID": "8"},
            {},
        )
    ] == [True, False, False, False, False, False]


def test_the_run_keeps_its_name_when_another_job_continues_it() -> None:
    assert read_agent_env({**STEP}).run_id == "7"
    assert read_agent_env({**STEP, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}).run_id == "5_3"
    again = read_agent_env({**STEP, "SLURM_JOB_ID": "9", "ELASTIC_HPC_FIRST_JOB": "5_3"})
    assert (again.job, again.run_id) == ("9", "5_3")


def test_a_port_in_use_is_skipped() -> None:
    with addresses.listen_from(43000) as first, addresses.listen_from(43000) as second:
        assert second.getsockname()[1] > first.getsockname()[1] >= 43000


def test_an_unknown_interface_is_refused_with_the_existing_interfaces() -> None:
    with pytest.raises(ElasticError, match=r"--interface 'nope0'.*expected one of .*lo"):
        addresses.to_publish("n1", "nope0", None)
    assert addresses.to_publish("n1", "lo", None) == ("127.0.0.1",)
    assert addresses.interface_of("127.0.0.1") == "lo"


def test_a_node_knows_its_own_names() -> None:
    assert addresses.is_me("n1", "n1.cluster")
    assert addresses.is_me(socket.gethostname(), "n1")
    assert addresses.is_me("127.0.0.1", "n1")
    assert not addresses.is_me("no-such-host.invalid", "n1")


def test_all_nodes_need_the_same_versions_of_elastic_hpc_torch_and_python() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert _software() == f"elastic_hpc {elastic_hpc.__version__}, torch {torch.__version__}, Python {version}"


def test_the_run_directory_is_for_its_owner_only_and_keeps_its_secret(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "logs" / "7").create()
    secret = rundir.make_secret()
    assert rundir.make_secret() == secret == rundir.read_secret()
    rundir.write("state.json", {"round": 1})
    append_event(rundir.path, "n1", 1.5, "join", {"node": "n1"})
    assert rundir.path.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in rundir.path.iterdir())
    assert rundir.read("state.json") == {"round": 1}
    assert rundir.read("missing.json") is None
    assert rundir.events() == [{"time": 1.5, "event": "join", "node": "n1"}]


def test_a_secret_that_other_users_can_read_is_refused(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.make_secret()
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ElasticError, match="mode 0644, 64 bytes; expected a file of mode 0600"):
        rundir.read_secret()


def test_damaged_records_are_reported_and_damaged_events_skipped(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    (tmp_path / "verdict.json").write_text('{"outcome": "fin')
    with pytest.raises(ElasticError, match=r"verdict\.json"):
        rundir.read("verdict.json")
    (tmp_path / "events.n1.jsonl").write_text('{"time": 1, "event": "join"}\nrubbish\n[1]\n{"time": 2, "ev')
    assert [event["event"] for event in rundir.events()] == ["join"]
    append_event(rundir.path, "n1", 2.5, "lost", {})
    assert [event["event"] for event in rundir.events()] == ["join", "lost"]


def test_the_verdict_of_another_run_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rundir = RunDir(tmp_path)
    first, second = {"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    assert conclude(rundir, first, 9) == 9
    rundir.write("verdict.json", {"outcome": "finished", "reason": "all workers finished", "run": 0})
    assert conclude(rundir, first, 137) == 0
    assert conclude(rundir, second, 0) == 1
    assert "the agents left no verdict" in capsys.readouterr().err
    rundir.write("verdict.json", {"outcome": "failed", "reason": "exit code 1", "run": 1})
    assert conclude(rundir, second, 0) == 1


POLICY = replace(
    simulated.POLICY,
    min_nodes=1,
    max_nodes=2,
    grow=False,
    max_restarts=3,
    heartbeat_timeout=0.0,
    join_timeout=1.0,
    last_call_timeout=1.0,
)
HOST = Host(1, "n2", ("10.0.0.2",), 29432)
ENDPOINT = {"run": 1, "node": 0, "host": "n1", "addresses": ["10.0.0.1"], "port": 29432}
WHY = "n1 at 10.0.0.1 port 29432: Connection refused"


async def no_store(round: int) -> int:
    raise AssertionError(f"nobody forms round {round}")


def agent(rundir: RunDir, run: int = 1, **changes: Any) -> Leading:
    """An agent that has lost all others, on nodes without Slurm's commands."""
    env = AgentEnv("7", 1, "n2", 2, run, 2, None, None, local=True)
    environ, policy = {"SLURM_JOB_ID": "7"}, replace(POLICY, **changes)
    return Leading(LaunchSpec("train.py"), env, HOST, 1, policy, rundir, environ, no_store, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("can_requeue", "contained"), [(True, False), (False, False), (True, True)])
def test_at_the_end_lost_nodes_are_given_up_and_the_batch_script_is_asked_to_end_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_requeue: bool, contained: bool
) -> None:
    released: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(slurm, "release", lambda job, lost: released.append((job, lost)))
    leading = agent(RunDir(tmp_path), can_requeue=can_requeue)
    leading._ending.contained = contained
    verdict = {"outcome": "finished", "reason": "all workers finished"}
    assert leading._ending.act(verdict, ["n3"], alone=False, others=[]) is None
    assert released == [("7", ["n3"] if can_requeue and not contained else [])]
    assert (tmp_path / "left").exists()
    RunDir(tmp_path).forget_verdict()
    assert not (tmp_path / "left").exists(), "it is that of one run"


def roster(restarts: int, requeues: int) -> Roster:
    return Roster(4, (HOST,), (Base(4, 0, (0, 1)),), restarts, requeues)


def test_a_node_that_is_alone_requeues_the_job(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.write("state.json", {"round": 3, "restarts": 1, "requeues": 0})
    ended = agent(rundir).give_up(roster(restarts=2, requeues=0), 9.0, WHY, patient=False)
    assert ended
    assert ended.outcome == "lost"
    verdict = rundir.read("verdict.json")
    state = rundir.read("state.json")
    assert verdict
    assert state
    known = (verdict["outcome"], verdict["run"], verdict["restarts"], verdict["requeues"], verdict["actor"])
    assert known == ("requeue", 1, 2, 1, LEADERLESS)
    assert (state["round"], state["restarts"], state["requeues"]) == (4, 2, 1), "the next run goes on from there"
    assert [event["event"] for event in rundir.events()] == ["verdict"]


@pytest.mark.parametrize("held", [roster(0, 2), None])
def test_a_head_that_is_lost_repeatedly_does_not_requeue_the_job_forever(tmp_path: Path, held: Roster | None) -> None:
    rundir = RunDir(tmp_path)
    if held is None:
        rundir.write("state.json", {"round": 4, "restarts": 0, "requeues": 2})
    assert agent(rundir).give_up(held, 9.0, WHY, patient=False)
    verdict = rundir.read("verdict.json")
    assert verdict
    assert (verdict["outcome"], verdict["cause"], verdict["requeues"]) == ("failed", "budget", 2)


def test_a_node_that_is_alone_ends_a_job_that_cannot_be_requeued(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    assert agent(rundir, can_requeue=False).give_up(None, 9.0, WHY, patient=False)
    assert (rundir.read("verdict.json") or {})["outcome"] == "failed"


@pytest.mark.parametrize("published", [True, False])
def test_a_node_that_was_cut_off_does_not_end_the_running_job(tmp_path: Path, *, published: bool) -> None:
    """The node must see for two heartbeat timeouts that no leader touches the record."""
    rundir = RunDir(tmp_path)
    if published:
        rundir.write("endpoint.json", ENDPOINT)
    assert agent(rundir, heartbeat_timeout=60.0).give_up(roster(0, 0), 99.0, WHY, patient=False) is None
    patient = agent(rundir)
    assert patient.give_up(roster(0, 0), 9.0, WHY, patient=True) is None
    assert rundir.read("verdict.json") is None


def test_each_change_of_the_record_restarts_the_wait_of_a_node_that_was_cut_off(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.beat()
    alone = agent(rundir, heartbeat_timeout=0.05)
    assert alone.give_up(None, 9.0, WHY, patient=False) is None
    since = alone._ending._last_beat[1]
    os.utime(rundir.path / "heartbeat", (1, 1))
    assert alone.give_up(None, 9.0, WHY, patient=False) is None
    assert alone._ending._last_beat[1] > since
    wait_for(lambda: alone.give_up(None, 9.0, WHY, patient=False))


def test_a_node_that_cannot_reach_the_leader_stays_out_of_the_job_and_reports_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rundir = RunDir(tmp_path)
    rundir.write("endpoint.json", ENDPOINT)
    outside = agent(rundir, heartbeat_timeout=5.0)
    for waited in (9.0, 11.0, 12.0):
        assert outside.give_up(None, waited, WHY, patient=False) is None
        assert len(rundir.unfit()) == (waited > 10)
    assert (rundir.unfit()[0]["node"], rundir.unfit()[0]["reason"].rpartition(": ")[2]) == ("n2", "Connection refused")
    assert caplog.text.count(WHY) == 1
    assert "--interface IFNAME" in caplog.text


def test_an_existing_verdict_is_kept(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    said = {"outcome": "finished", "reason": "all workers finished", "run": 1, "actor": "batch script"}
    rundir.write("verdict.json", said)
    ended = agent(rundir).give_up(roster(0, 0), 9.0, WHY, patient=False)
    assert ended
    assert (ended.outcome, ended.reason, ended.logged) == ("finished", "all workers finished", True)
    ended = agent(rundir, run=2).give_up(roster(0, 0), 9.0, WHY, patient=False)
    assert ended
    assert ended.outcome == "lost", "that was the verdict of the run before"
    assert (rundir.read("verdict.json") or {})["run"] == 2


def test_the_leader_of_another_run_is_not_contacted(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    assert agent(rundir).find_leader() is None
    where = {"run": 0, "node": 1, "host": "n2", "addresses": ["10.0.0.2"], "port": 29432}
    rundir.write("endpoint.json", where)
    assert agent(rundir).find_leader() is None
    assert agent(rundir, run=0).find_leader() == Published(0, HOST)


def test_an_agent_whose_run_has_long_published_nothing_dials_the_jobs_first_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run directory has been full since the previous run."""
    rundir = RunDir(tmp_path)
    rundir.write("endpoint.json", {**ENDPOINT, "run": 0})
    looking = agent(rundir)
    looking.spec = LaunchSpec("train.py", rdzv_endpoint=Endpoint("n1", 29400))
    assert looking.find_leader() is None
    monkeypatch.setattr("elastic_hpc.agent.leading._GUESS_AFTER", 0.0)
    assert looking.find_leader() == Published(1, Host(0, "n1", ("n1",), 29432))
    rundir.write("endpoint.json", ENDPOINT)
    assert looking.find_leader() == Published(1, Host(0, "n1", ("10.0.0.1",), 29432))


def test_a_leader_that_takes_over_keeps_the_charges_of_the_previous_leader(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_launch_options(parser)
    args = parser.parse_args([])
    args.script, args.script_args = "train.py", []
    leading = agent(RunDir(tmp_path))
    leading.spec = LaunchSpec.from_namespace(args)
    held = Promises()
    held.accept(roster(2, 1))
    leader = leading.lead(held, "n1 lost").leader
    assert (leader.round, leader.restarts, leader.requeues, leader.leads) == (5, 2, 1, False)
    RunDir(tmp_path).write("state.json", {"round": 7, "restarts": 2, "requeues": 1})
    leading.prepare()
    leader = leading.lead(Promises(), "").leader
    assert (leader.round, leader.restarts, leader.requeues, leader.leads) == (8, 2, 1, True)
    assert leading.recorder
    leading.recorder.close()
