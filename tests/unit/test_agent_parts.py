"""The parts an agent is made of: its environment, its addresses, the run directory, the guard."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_hpc import guard, net
from elastic_hpc.conclude import conclude, requeue_without_leader
from elastic_hpc.decide import Policy
from elastic_hpc.env import AgentEnv, prepare_worker_env, read_agent_env, workers_per_node
from elastic_hpc.errors import ElasticError
from elastic_hpc.rundir import RunDir

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


def test_an_array_task_is_named_as_scontrol_names_it() -> None:
    assert read_agent_env({**STEP, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}).job == "5_3"


def test_several_agents_on_a_node_are_refused_with_the_option_to_use() -> None:
    with pytest.raises(ElasticError, match=r"6 agents on 3 nodes.*--ntasks-per-node=1"):
        read_agent_env({**STEP, "SLURM_STEP_NUM_TASKS": "6"})


def test_outside_slurm_the_error_says_what_to_type() -> None:
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
    assert workers_per_node(wanted, env, visible) == expected


def test_gpu_workers_without_a_gpu_are_refused() -> None:
    env = AgentEnv("7", 0, "n1", 1, 0, 16, 0, None, local=False)
    with pytest.raises(ElasticError, match=r"n1 has no GPU granted.*--gpus-per-node"):
        workers_per_node("gpu", env, 0)


def test_workers_do_not_see_that_slurm_launched_the_agents() -> None:
    environ = {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "3"}
    prepare_worker_env(environ, AgentEnv("7", 1, "n2", 3, 0, 9, None, None, local=False), 2, "token")
    assert not {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID"} & environ.keys()
    assert environ["SLURM_JOB_ID"] == "7"
    assert environ["OMP_NUM_THREADS"] == "4"
    kept = {"OMP_NUM_THREADS": "3"}
    prepare_worker_env(kept, AgentEnv("7", 1, "n2", 3, 0, 9, None, None, local=False), 2, "token")
    assert kept["OMP_NUM_THREADS"] == "3", "what the user set is kept"


def test_a_port_that_is_taken_is_passed_over() -> None:
    with net.listen_from(43000) as first, net.listen_from(43000) as second:
        assert second.getsockname()[1] > first.getsockname()[1] >= 43000


def test_an_unknown_interface_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ElasticError, match=r"--interface 'nope0'.*expected one of .*lo"):
        net.addresses_to_publish("n1", "nope0", None)
    assert net.addresses_to_publish("n1", "lo", None) == ("127.0.0.1",)
    assert net.interface_of("127.0.0.1") == "lo"


def test_a_node_knows_its_own_names() -> None:
    assert net.is_me("n1", "n1.cluster")
    assert net.is_me(socket.gethostname(), "n1")
    assert net.is_me("127.0.0.1", "n1")
    assert not net.is_me("no-such-host.invalid", "n1")


def test_the_run_directory_is_for_its_owner_only_and_keeps_its_secret(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "logs" / "7").create()
    secret = rundir.make_secret()
    assert rundir.make_secret() == secret == rundir.read_secret()
    rundir.write("state.json", {"round": 1})
    rundir.append_event(1.5, "join", {"node": "n1"})
    assert rundir.path.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in rundir.path.iterdir())
    assert rundir.read("state.json") == {"round": 1}
    assert rundir.read("missing.json") is None
    assert rundir.events() == [{"time": 1.5, "event": "join", "node": "n1"}]


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.make_secret()
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ElasticError, match="expected a file of mode 0600"):
        rundir.read_secret()


def test_damaged_records_are_told_and_damaged_events_left_out(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    (tmp_path / "verdict.json").write_text('{"outcome": "fin')
    with pytest.raises(ElasticError, match=r"verdict\.json"):
        rundir.read("verdict.json")
    (tmp_path / "events.jsonl").write_text('{"time": 1, "event": "join"}\nrubbish\n[1]\n{"time": 2, "ev')
    assert [event["event"] for event in rundir.events()] == ["join"]


def test_the_guard_kills_everything_an_agent_left_behind_when_its_pipe_closes() -> None:
    token = secrets.token_hex(8)
    theirs, ours = os.pipe()
    watcher = subprocess.Popen([sys.executable, "-I", "-S", guard.__file__, token], stdin=theirs)
    os.close(theirs)
    marked = {**os.environ, "ELASTIC_HPC_AGENT": token}
    # a worker in a session of its own that started a child in yet another one; both ignore SIGTERM
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    left = subprocess.Popen([sys.executable, "-c", parent], env=marked, start_new_session=True, stdout=subprocess.PIPE)
    innocent = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
    try:
        assert left.stdout
        assert innocent.stdout
        assert left.stdout.readline() == b"up\n" == innocent.stdout.readline()
        watcher.send_signal(signal.SIGTERM)  # Slurm's warning hits the guard too
        assert len(guard.marked(f"ELASTIC_HPC_AGENT={token}\0".encode())) == 2
        os.close(ours)
        assert left.wait(timeout=10) == -signal.SIGKILL
        assert watcher.wait(timeout=10) == 0
        assert guard.marked(f"ELASTIC_HPC_AGENT={token}\0".encode()) == []
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()
        for pipe in (left.stdout, innocent.stdout):
            assert pipe
            pipe.close()


def test_the_verdict_of_another_run_is_not_acted_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rundir = RunDir(tmp_path)
    assert conclude(rundir, "7", 0, 9) == 9
    rundir.write("verdict.json", {"outcome": "finished", "reason": "all workers finished", "run": 0})
    assert conclude(rundir, "7", 0, 137) == 0
    assert conclude(rundir, "7", 1, 0) == 1
    assert "the agents left no verdict" in capsys.readouterr().err
    rundir.write("verdict.json", {"outcome": "requeue", "reason": "below MIN", "run": 1, "acted": True})
    assert conclude(rundir, "7", 1, 75) == 0


def test_the_summary_tells_rounds_causes_and_gaps(tmp_path: Path) -> None:
    from elastic_hpc.summary import render, rounds

    nodes = ["n1", "n2", "n3"]
    events = [
        {"time": 10.0, "event": "start", "run": 0},
        {"time": 12.0, "event": "round", "round": 1, "nodes": nodes, "world_size": 3, "restarts": 0},
        {"time": 30.0, "event": "lost", "node": "n3", "reason": "nothing heard for 5 s", "silent": 5.0},
        {"time": 30.0, "event": "restart", "round": 2, "restarts": 1, "reason": "n3 lost"},
        {"time": 30.5, "event": "round", "round": 2, "nodes": nodes[:2], "world_size": 2, "restarts": 1},
        {"time": 50.0, "event": "verdict", "outcome": "finished", "reason": "all workers finished"},
    ]
    first, second = rounds(events)
    assert (first.gap, first.ended, first.cause) == (2.0, 25.0, "n3 lost")
    assert (second.gap, second.world_size, second.ended) == (5.5, 2, 50.0)
    assert rounds(events[:2])[0].ended is None
    assert render(json.loads(json.dumps(events))).row_count == 2


POLICY = Policy(
    min_nodes=1,
    max_nodes=2,
    max_restarts=3,
    max_requeues=2,
    heartbeat_timeout=0.0,
    join_timeout=1.0,
    last_call_timeout=1.0,
    can_requeue=True,
)


@pytest.mark.parametrize("state", [{"restarts": 3, "requeues": 0}, {"restarts": 0, "requeues": 2}])
def test_a_head_that_is_lost_again_and_again_does_not_requeue_for_ever(tmp_path: Path, state: dict[str, int]) -> None:
    rundir = RunDir(tmp_path)
    rundir.write("state.json", {**state, "round": 4})
    requeue_without_leader(rundir, AgentEnv("7", 0, "n1", 2, 1, 2, None, None, local=False), 4, POLICY)
    verdict = rundir.read("verdict.json")
    assert verdict
    assert (verdict["outcome"], verdict["run"], verdict["restarts"]) == ("failed", 1, state["restarts"])


def test_a_node_that_was_cut_off_leaves_the_living_job_alone(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.write("state.json", {"restarts": 1, "requeues": 0, "round": 5})
    requeue_without_leader(rundir, AgentEnv("7", 0, "n1", 2, 1, 2, None, None, local=False), 4, POLICY)
    assert rundir.read("verdict.json") is None
