"""A job from Python: what its run directory says, and what Slurm is asked for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from elastic_hpc import Job, JobSpec, SlurmError, UsageError, render, submit
from elastic_hpc.rundir import RunDir

FINISHED = {"outcome": "finished", "cause": "", "reason": "all workers finished", "failure": None, "run": 0}
FAILED = {**FINISHED, "outcome": "failed", "cause": "budget", "reason": "used up", "failure": {"rank": 1}}
REQUEUED = {**FINISHED, "outcome": "requeue", "cause": "time limit", "reason": "time limit"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """One that has run, with the programs of a Slurm that knows no job: its answer is the text in ``slurm``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("squeue", "scancel", "sbatch"):
        (programs / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/asked\n. {tmp_path}/slurm\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rundir = RunDir(tmp_path / "elastic-logs" / "17").create()
    rundir.append_event(1.0, "start", {"run": 0, "job": "17", "granted": 2})
    world = {"round": 2, "nodes": ["n1", "n3"], "world_size": 4, "restarts": 1, "leader": "n1"}
    rundir.append_event(1.0, "round", world)
    says(tmp_path, "echo squeue: error: Invalid job id specified >&2; exit 1")
    return Job(rundir.path)


def says(folder: Path, answer: str) -> None:
    (folder / "slurm").write_text(answer)


def record(job: Job, verdict: dict[str, object]) -> RunDir:
    rundir = RunDir(job.run_dir)
    rundir.append_event(2.0, "verdict", {**verdict, "restarts": 1, "requeues": 3})
    rundir.write("verdict.json", verdict)
    return rundir


@pytest.mark.parametrize(
    ("verdict", "state"),
    [(FINISHED, "COMPLETED"), (FAILED, "FAILED"), ({**FAILED, "cause": "user"}, "CANCELLED")],
)
def test_a_job_that_has_ended_is_known_when_slurm_has_forgotten_it(job: Job, verdict: dict, state: str) -> None:
    record(job, verdict)
    status = job.wait(timeout=5)
    assert (status.state, status.done, status.reason) == (state, True, verdict["reason"])
    assert (status.round, status.nodes, status.world_size) == (2, ("n1", "n3"), 4)
    assert (status.restarts, status.requeues, status.failure) == (1, 3, verdict["failure"])
    assert not Path("asked").exists()


def test_a_job_without_a_verdict_that_slurm_does_not_know_is_over(job: Job) -> None:
    status = job.wait(timeout=5)
    assert (status.state, status.done) == ("UNKNOWN", True)


def test_a_slurm_that_does_not_answer_does_not_end_a_job(job: Job, tmp_path: Path) -> None:
    says(tmp_path, "echo squeue: error: Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(SlurmError, match="Unable to contact"):
        job.status()
    with pytest.raises(TimeoutError, match="job 17 has not ended in 1 s; it goes on"):
        job.wait(timeout=1)


def test_a_job_that_has_not_started_is_cancelled_in_the_queue(job: Job, tmp_path: Path) -> None:
    says(tmp_path, "echo '23|PENDING|N/A|N/A|Resources'")
    assert Job(tmp_path / "elastic-logs" / "23").stop() == "cancelled"
    assert Path("asked").read_text().splitlines()[-1] == f"{tmp_path}/bin/scancel 23"


def test_a_requeue_is_waited_through(job: Job, tmp_path: Path) -> None:
    record(job, REQUEUED).mark_acted(0, "17")
    says(tmp_path, "echo '17|PENDING|N/A|N/A|None'")
    assert (job.status().state, job.status().done) == ("PENDING", False)
    with pytest.raises(TimeoutError):
        job.wait(timeout=1)
    assert job.stop() == "cancelled"
    assert Path("asked").read_text().splitlines()[-1].endswith("scancel 17")


def test_a_job_that_another_goes_on_for_is_that_job_from_then_on(job: Job, tmp_path: Path) -> None:
    record(job, REQUEUED)
    says(
        tmp_path, f"echo '17|COMPLETED|N/A|N/A|None'; echo '18|RUNNING|N/A|N/A|None'; printf 18 > {job.run_dir}/acted.0"
    )  # while it is asked for
    status = job.status()
    assert (status.state, status.done, job.slurm_id) == ("RUNNING", False, "18")


def test_logs_are_those_of_one_rank_round_after_round(job: Job) -> None:
    for round in ("0.1", "0.10", "0.9", "1.11"):
        for rank in (1, 10):
            path = job.run_dir / "logs" / round / "n1" / f"rank{rank}.out"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{round} {rank}\n")
    assert list(job.logs(rank=1)) == ["0.1 1\n", "0.9 1\n", "0.10 1\n", "1.11 1\n"]
    assert list(job.logs(rank=1, stream="err")) == []


def test_a_job_is_the_same_from_python_as_from_the_command_line(job: Job, tmp_path: Path) -> None:
    Path("train.py").touch()
    Path("elastic_hpc.toml").write_text("[sbatch]\npartition = 'gpu'\n")
    spec = JobSpec.of(
        "train.py", "--lr", "1e-3", nodes="4:8", grow=True, free_growth=False, preflight=None, exclusive=True, time=60
    )
    text = render(spec)
    for line in ("--nodes=4-8", "--partition=gpu", "--exclusive", "--time=60"):
        assert f"#SBATCH {line}" in text
    assert "-- train.py --lr 1e-3" in text.replace("\\\n  ", "")
    assert "--grow on" in text.replace("\\\n  ", "")
    says(tmp_path, "cat > script; echo 19")
    submitted = submit(spec)
    assert (submitted.id, submitted.run_dir) == ("19", tmp_path / "elastic-logs" / "19")
    assert Path("script").read_text() == text


def test_an_array_has_tasks_and_no_state_of_its_own(job: Job, tmp_path: Path) -> None:
    Path("train.py").touch()
    says(tmp_path, "echo 20")
    array = submit(JobSpec.of("train.py", nodes=2, array="0-3"))
    assert array.task(3).run_dir.name == "20_3"
    with pytest.raises(UsageError, match=r"each of its tasks is a job: job.task\(0\)"):
        array.status()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "nodes: missing, for example nodes='2:4'"),
        ({"nodes": 2, "ntasks": 4}, "--ntasks=4: with a task count Slurm grants only MIN nodes"),
        ({"nodes": 2, "wait": True}, "wait: belongs on sbatch's command line"),
        ({"nodes": 2, "grow": 7}, "--grow '7': expected on or off"),
    ],
)
def test_what_the_command_refuses_is_refused_from_python(job: Job, options: dict, complaint: str) -> None:
    Path("train.py").touch()
    with pytest.raises(UsageError) as refused:
        JobSpec.of("train.py", **options)
    assert complaint in str(refused.value)


def test_waiting_asks_slurm_less_and_less_often(job: Job, tmp_path: Path) -> None:
    says(tmp_path, "echo '17|RUNNING|N/A|N/A|None'")
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        job.wait(timeout=4)
    assert len(Path("asked").read_text().splitlines()) <= 1 + (time.monotonic() - begin) // 2
