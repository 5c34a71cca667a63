"""A job that requeues itself, or ends, in the grace time of its preemption: stand-ins for Slurm of several versions."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from test_slurm import JOB, RUNNING

from elastic_hpc.agent import conclude
from elastic_hpc.cli.hpc import main
from elastic_hpc.membership.leaderless import LEADERLESS
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv

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
    monkeypatch.setattr(conclude.signal, "signal", lambda *_: None)  # keeps the signal handlers of this process
    return RunDir(tmp_path / "run").create()


def ends(rundir: RunDir, run: int, outcome: str) -> int:
    """End ``run`` with ``outcome``. Returns the exit code of the batch script."""
    rundir.write("verdict.json", {"run": run, "outcome": outcome, "cause": "", "reason": "", "failure": None})
    return conclude.conclude(rundir, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(run)}, 0)


def slurm(folder: Path, version: str, preempted: str) -> None:
    (folder / "job").write_text(JOB.format(**{**RUNNING, "preempted": preempted}))
    (folder / "scontrol").write_text(SCONTROL.format(version=version, folder=folder))
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize("led", [False, True])
def test_agents_that_have_found_no_leader_do_not_cancel_an_allocation_whose_job_has_one_by_then(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch, *, led: bool
) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(conclude.slurm, "cancel", cancelled.append)
    monkeypatch.setattr(conclude, "_time_for_slurm", lambda: timedelta(seconds=0.2))
    monkeypatch.setattr(conclude.time, "sleep", lambda _: rundir.beat() if led else None)
    rundir.beat()
    os.utime(rundir.path / "heartbeat", (1, 1))
    env = AgentEnv("7", 2, "n2", 3, 0, 1, None, None, local=False)
    assert conclude.cancel(rundir, env, unless_led=True) is None
    assert cancelled == ([] if led else ["7"])


@pytest.mark.parametrize("deputy_of", [None, "n1"])
@pytest.mark.parametrize("led", [False, True])
def test_agents_that_have_found_no_leader_do_not_requeue_a_job_that_has_one_by_then(
    rundir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    *, led: bool, deputy_of: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(conclude, "_ALONE_TIMEOUT", timedelta(0))
    monkeypatch.setattr(conclude, "_DEPUTY_TIMEOUT", timedelta(0))
    slurm(tmp_path, "24.05.0", "None")
    rundir.beat()
    os.utime(rundir.path / "heartbeat", (1, 1))
    if led:  # the leader updates its heartbeat while the step waits until the other agents leave
        shown = SCONTROL.format(version="24.05.0", folder=tmp_path)
        (tmp_path / "scontrol").write_text(shown.replace("show)", f"show) touch {rundir.path}/heartbeat;"))
    rundir.write("verdict.json", {"run": 0, "outcome": "requeue", "reason": "no leader", "actor": LEADERLESS})
    environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURMD_NODENAME": "n2"}
    assert conclude.conclude_alone(rundir, environ, "requeue", deputy_of=deputy_of, unless_led=True) == 0
    assert ("Restarts=1" in (tmp_path / "job").read_text()) == (not led)
    assert ("no requeue: a leader continues the job" in capsys.readouterr().err) == led


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1)])
@pytest.mark.parametrize("version", ["24.05.0", "24.11.5", "26.05.3"])
def test_if_a_newer_slurm_restarts_an_ended_job_the_new_run_ends_immediately(
    rundir: RunDir, tmp_path: Path, version: str, outcome: str, code: int
) -> None:
    slurm(tmp_path, version, "2026-11-29T02:00:00")
    assert ends(rundir, 0, "requeue") == 0
    assert not (rundir.path / "over").exists(), "the job is to go on"
    assert ends(rundir, 1, outcome) == code
    assert (rundir.path / "over").read_text() == str(code)  # the batch script ends at this file: see test_script.py


@pytest.mark.parametrize(
    ("version", "preempted"), [("22.05.8", "2026-11-29T02:00:00"), ("23.11.10", "t0"), ("24.11.5", "None")]
)
def test_a_job_that_slurm_will_not_restart_leaves_no_mark(
    rundir: RunDir, tmp_path: Path, version: str, preempted: str
) -> None:
    slurm(tmp_path, version, preempted)
    assert ends(rundir, 0, "requeue") == 0
    assert ends(rundir, 1, "finished") == 0
    assert not (rundir.path / "over").exists()


@pytest.mark.parametrize(("version", "comes_back"), [("22.05.8", False), ("23.11.10", False), ("24.11.5", True)])
@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1)])
def test_a_job_that_ends_in_the_grace_time_does_not_train_again_when_slurm_requeues_it(
    rundir: RunDir, tmp_path: Path, version: str, outcome: str, code: int, *, comes_back: bool
) -> None:
    slurm(tmp_path, version, "2026-11-29T02:00:00")
    assert ends(rundir, 0, outcome) == code
    assert (rundir.path / "over").exists() == comes_back
    if comes_back:
        assert (rundir.path / "over").read_text() == str(code)


def test_why_shows_slurms_state_of_a_job_whose_preemption_cancels_it(
    rundir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PreemptMode=CANCEL: Slurm 24.05 and newer keep calling such a job PREEMPTED, and no requeue changes that."""
    slurm(tmp_path, "24.11.5", "2026-11-29T02:00:00")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho PREEMPTED\n")
    (tmp_path / "squeue").chmod(0o755)
    assert [ends(rundir, 0, "requeue"), ends(rundir, 1, "finished")] == [0, 0]
    rundir.write("spec.json", {"job": "7"})
    (rundir.path / "script.sbatch").touch()
    assert main(["why", str(rundir.path)]) == 0
    told = capsys.readouterr().out
    assert "COMPLETED" in told
    assert "the training finished, but Slurm recorded PREEMPTED" in told
