"""A job that requeues itself in the grace time of its preemption, under a stand-in for Slurm of several versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_slurm import JOB, RUNNING

from elastic_hpc.agent import conclude
from elastic_hpc.record.rundir import RunDir

SCONTROL = """\
#!/bin/sh
case "$1" in
  --version) echo "slurm {version}";;
  show) cat {folder}/job;;
  requeue) sed -i s/Restarts=0/Restarts=1/ {folder}/job;;
esac
"""


@pytest.fixture
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(conclude.signal, "signal", lambda *_: None)  # the handlers of this process
    return RunDir(tmp_path / "run").create()


def ends(rundir: RunDir, run: int, outcome: str) -> int:
    """The exit code of the batch script of ``run``."""
    rundir.write("verdict.json", {"run": run, "outcome": outcome, "reason": "", "failure": None})
    return conclude.conclude(rundir, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(run)}, 0)


def slurm(folder: Path, version: str, preempted: str) -> None:
    (folder / "job").write_text(JOB.format(**{**RUNNING, "preempted": preempted}))
    (folder / "scontrol").write_text(SCONTROL.format(version=version, folder=folder))
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1)])
@pytest.mark.parametrize("version", ["24.05.0", "24.11.5", "26.05.3"])
def test_the_run_to_which_a_newer_slurm_sends_an_ended_job_ends_at_once(
    rundir: RunDir, tmp_path: Path, version: str, outcome: str, code: int
) -> None:
    slurm(tmp_path, version, "2026-11-29T02:00:00")
    assert ends(rundir, 0, "requeue") == 0
    assert not (rundir.path / "over").exists(), "the job is to go on"
    assert ends(rundir, 1, outcome) == code
    assert (rundir.path / "over").read_text() == str(code)  # the batch script ends there: test_script.py


@pytest.mark.parametrize(
    ("version", "preempted"), [("22.05.8", "2026-11-29T02:00:00"), ("23.11.10", "t0"), ("24.11.5", "None")]
)
def test_a_job_that_no_such_run_awaits_leaves_no_mark(
    rundir: RunDir, tmp_path: Path, version: str, preempted: str
) -> None:
    slurm(tmp_path, version, preempted)
    assert ends(rundir, 0, "requeue") == 0
    assert ends(rundir, 1, "finished") == 0
    assert not (rundir.path / "over").exists()
