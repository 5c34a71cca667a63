"""The end of a job in Slurm's records, where that differs from the job's own record."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import records
from test_status import ended, seen

from elastic_hpc import slurm
from elastic_hpc.cli.hpc import main
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm import job
from elastic_hpc.view.state import state_of
from elastic_hpc.view.story import Story

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def answers(folder: Path, squeue: str, sacct: str) -> None:
    for name, body in (("squeue", squeue), ("sacct", sacct)):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{body}\n')
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("squeue", "sacct", "end"),
    [
        ("echo TIMEOUT", NO_ACCOUNTING, "TIMEOUT"),
        ("echo COMPLETING", "echo COMPLETED", "COMPLETING"),
        (FORGOTTEN, "echo CANCELLED by 1000", "CANCELLED"),
        (FORGOTTEN, "printf 'RESIZING\\nCOMPLETED\\n'", "COMPLETED"),
        ("", "echo OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        (FORGOTTEN, "echo RUNNING", ""),  # slurmctld has lost the job, or the accounting has lost the job's end
        (FORGOTTEN, NO_ACCOUNTING, ""),
        ("exec sleep 60", "exec sleep 60", ""),
    ],
)
def test_slurms_record_of_the_end_comes_from_slurmctld_or_else_from_the_accounting(
    commands: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str, end: str
) -> None:
    monkeypatch.setattr(job, "_END_SECONDS", 1 if "sleep" in squeue else 10)
    answers(commands, squeue, sacct)
    begin = time.monotonic()
    assert slurm.recorded_end("7_3") == end
    assert time.monotonic() - begin < 10
    assert all("--jobs=7_3" in call for call in (commands / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    "recorded", ["TIMEOUT", "PREEMPTED", "NODE_FAIL", "CANCELLED", "FAILED", "OUT_OF_MEMORY", "NEW"]
)
def test_a_finished_training_is_reported_although_slurm_calls_the_end_a_failure(recorded: str) -> None:
    state, note, _ = state_of(replace(ended(), recorded_end=recorded), Story())
    reason, told = note.splitlines()
    assert (state, reason) == ("COMPLETED", "all workers finished")
    assert told.startswith(f"the training finished, but Slurm recorded {recorded}")
    assert "--dependency=afterok never start" in told


@pytest.mark.parametrize("cause", ["budget", "user"])
def test_a_failed_training_is_reported_although_slurm_calls_the_end_completed(cause: str) -> None:
    state, note, _ = state_of(replace(ended("failed", cause=cause), recorded_end="COMPLETED"), Story())
    assert state != "COMPLETED"
    assert "--dependency=afterok start all the same" in note


@pytest.mark.parametrize(
    ("outcome", "recorded"), [("finished", "COMPLETED"), ("finished", ""), ("failed", "FAILED"), ("failed", "TIMEOUT")]
)
def test_nothing_is_reported_if_both_mean_the_same_to_a_dependency_or_slurm_knows_nothing(
    outcome: str, recorded: str
) -> None:
    assert state_of(replace(ended(outcome), recorded_end=recorded), Story()).note == "all workers finished"


@pytest.mark.parametrize("outcome", ["finished", "failed"])
@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("COMPLETING", "Slurm waits for its nodes"),
        ("RUNNING", "its batch script has not ended"),
        ("PENDING", "it starts again, and ends at once"),
    ],
)
def test_a_job_that_has_ended_by_its_record_but_not_yet_for_slurm_is_reported_as_such(
    outcome: str, word: str, why: str
) -> None:
    state, note, _ = state_of(replace(ended(outcome), recorded_end=word), Story())
    assert state == ("COMPLETED" if outcome == "finished" else "FAILED")
    assert note.splitlines()[1].startswith(f"Slurm still says {word}: {why}")


def test_the_accounting_shows_how_a_job_ended_whose_record_has_no_end() -> None:
    state, note, advice = state_of(seen(queued=None, recorded_end="NODE_FAIL"), records.story("grown"))
    assert (state, advice) == ("NODE_FAIL", ())
    assert "according to Slurm's accounting" in note


@pytest.mark.parametrize("command", ["why", "status"])
def test_why_and_status_of_one_job_show_slurms_end(
    commands: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    answers(commands, "echo TIMEOUT", NO_ACCOUNTING)
    rundir = RunDir(commands / "7").create()
    rundir.write("verdict.json", {"run": 0, "outcome": "finished", "cause": "", "reason": "done", "failure": None})
    assert main([command, str(rundir.path)]) == 0
    assert "Slurm recorded" not in capsys.readouterr().out, "elastic-srun: the end is that of an allocation"
    (rundir.path / "script.sbatch").touch()
    assert main([command, str(rundir.path)]) == 0
    assert "Slurm recorded TIMEOUT" in capsys.readouterr().out.replace("\n", " ")
