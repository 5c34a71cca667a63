"""``elastic-hpc shell``: where the shell of the user starts, and in which environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import records

from elastic_hpc.record.events import append_event
from elastic_hpc.record.rundir import RunDir

ROOT = Path(__file__).parents[2]
SHOW = "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))"
SHOWN_JOB = """JobId=17 JobName=train
   UserId=me(1) JobState=RUNNING Reason=None NodeList=n[1-2] Restarts=0 Requeue=1
   Command=(null)"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory of job 17, which runs on n1 and n2, and on n5 through joiner
    job 21; srun prints its arguments.
    """
    records.alone(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "ELASTIC_"))]:
        monkeypatch.delenv(name)
    rundir = RunDir(tmp_path / "elastic-logs" / "17").create()
    rundir.make_secret()
    folder = rundir.path
    append_event(folder, "n2", 1.0, "start", {"run": 0, "job": "17", "granted": 2})
    world = {"round": 1, "nodes": ["n1", "n2", "n5"], "world_size": 3, "restarts": 0, "leader": "n2"}
    append_event(folder, "n2", 1.0, "round", world)
    program(tmp_path / "srun", 'printf "%s\\n" "$@"; exit 3')
    program(tmp_path / "scontrol", f"case $* in *hostnames*) echo n1; echo n2;; *) echo '{SHOWN_JOB}';; esac")
    squeue_says(tmp_path, "RUNNING")
    return folder


def squeue_says(folder: Path, state: str) -> None:
    joiners = "echo '21|RUNNING|n5||1:00:00|None'"
    program(folder / "squeue", f"case $* in *--name=join*) {joiners};; *) echo '17|{state}|N/A|N/A|None';; esac")


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def called(*words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "elastic_hpc", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environ, stdin=subprocess.DEVNULL, timeout=60
    )


@pytest.mark.parametrize(("node", "job"), [("n1", "17"), ("n5", "21")])
def test_a_command_runs_in_a_step_of_the_job_that_the_node_belongs_to(run_dir: Path, node: str, job: str) -> None:
    done = called("shell", "17", node, "--", "nvidia-smi", "-L")
    words = done.stdout.splitlines()
    assert {f"--jobid={job}", f"--nodelist={node}", "--overlap"} <= set(words)
    assert "--pty" not in words
    assert words[-4:] == ["inside", str(run_dir), "nvidia-smi", "-L"]
    assert done.returncode == 3, done.stderr


def test_without_a_node_the_command_runs_on_the_leaders_node(run_dir: Path) -> None:
    words = called("shell", "17", "--", "nvidia-smi", "-q", "--", "x").stdout.splitlines()
    assert "--nodelist=n2" in words
    assert words[-6:] == ["inside", str(run_dir), "nvidia-smi", "-q", "--", "x"]


def test_jobs_and_nodes_without_access_are_refused_with_a_hint(run_dir: Path, tmp_path: Path) -> None:
    done = called("shell", "17", "n9", "--", "ls")
    assert (done.returncode, done.stderr) == (2, "elastic-hpc: n9: expected a node of job 17: n1 n2 n5\n")
    done = called("shell", "17")
    assert done.returncode == 2
    assert "expected a command: elastic-hpc shell JOB NODE -- COMMAND" in done.stderr
    squeue_says(tmp_path, "PENDING")
    done = called("shell", "17", "n1", "--", "ls")
    assert done.returncode == 1
    assert done.stderr.startswith("elastic-hpc: job 17 is PENDING")
    RunDir(run_dir).hold().close()
    assert "runs without Slurm" in called("shell", "17", "n1", "--", "ls").stderr


@pytest.fixture
def agent(run_dir: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like the agent of the job, with an environment of its own."""
    (tmp_path / "work").mkdir()
    environ = {
        "PATH": os.environ["PATH"], "OF_THE_SETUP": "yes", "SLURM_STEP_ID": "0", "TERM": "dumb", "LANG": "of the agent",
        "ELASTIC_HPC_NOTIFY": "https://secret", "ELASTIC_HPC_JOIN": "x",
    }  # fmt: skip
    command = [sys.executable, "-c", "print(flush=True); input()", "elastic_hpc.agent", "--run-dir", str(run_dir)]
    with subprocess.Popen(
        command, env=environ, cwd=tmp_path / "work", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def test_the_command_has_the_environment_and_the_folder_of_the_agent_and_its_own_step(
    run_dir: Path, agent: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "7")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("OF_THE_CALLER", "yes")
    done = called("inside", str(run_dir), sys.executable, "-c", SHOW)
    environ, folder = json.loads(done.stdout)
    assert folder == str(tmp_path / "work")
    assert environ["OF_THE_SETUP"] == "yes"
    assert (environ["SLURM_STEP_ID"], environ["TERM"]) == ("7", "xterm")
    assert environ["ELASTIC_HPC_RUN_DIR"] == str(run_dir)
    assert not environ.keys() & {"OF_THE_CALLER", "ELASTIC_HPC_NOTIFY", "ELASTIC_HPC_JOIN"}


def test_a_shell_shows_the_workers_and_is_the_users_own_shell(
    run_dir: Path, agent: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "my-shell", "echo $OF_THE_SETUP")
    monkeypatch.setenv("SHELL", str(tmp_path / "my-shell"))
    environ = {**os.environ, "ELASTIC_HPC_RUN_DIR": str(run_dir), "RANK": "5"}
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout
        worker.stdout.readline()
        done = called("inside", str(run_dir))
        worker.kill()
    assert done.stdout == "yes\n"
    assert f"rank 5: pid {worker.pid}" in done.stderr


def test_without_an_agent_the_environment_is_that_of_the_step(run_dir: Path) -> None:
    done = called("inside", str(run_dir), "nosuchprogram")
    assert done.returncode == 127
    assert done.stderr.splitlines() == [
        "elastic-hpc: no agent of the job runs on this node: the environment is your own",
        "elastic-hpc: nosuchprogram: No such file or directory",
    ]
