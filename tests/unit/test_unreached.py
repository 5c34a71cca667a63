"""The end of a batch script whose srun could not reach a node, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_slurm import JOB, RUNNING

from elastic_hpc.agent import conclude
from elastic_hpc.record.rundir import RunDir

ENVIRON = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURMD_NODENAME": "n1"}
FAILED = """\
srun: error: Task launch for StepId=7.1 failed on node n4: Communication connection failure
srun: error: Application launch failed: Communication connection failure
"""


class Slurm:
    """A job that runs on n1 to n4, and an srun that ends with the output ``says``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._command(
            "scontrol",
            f'echo "$*" >> {folder}/asked; case "$*" in --version) echo slurm 22.05.8;; "show hostnames n[1-4]") '
            f'echo n1 n2 n3 n4;; "show hostnames n[1-3]") echo n1 n2 n3;; "show job"*) cat {folder}/job;; '
            f"requeue*) sed -i s/Restarts=0/Restarts=1/ {folder}/job;; esac",
        )
        self.job()
        self.srun("", 0)

    def _command(self, name: str, body: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.folder / name).chmod(0o755)

    def job(self, nodes: str = "n[1-4]", state: str = "RUNNING") -> None:
        shown = JOB.format(**{**RUNNING, "state": state}).replace(" NodeList=n[1-2]", f" NodeList={nodes}")
        (self.folder / "job").write_text(shown)

    def srun(self, says: str, code: int) -> None:
        (self.folder / "says").write_text(says)
        self._command("srun", f'echo "$*" >> {self.folder}/started; cat {self.folder}/says >&2; exit {code}')

    @property
    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(ENVIRON, "PATH", os.environ["PATH"])
    monkeypatch.setattr(conclude.signal, "signal", lambda *_: None)  # keeps the signal handlers of this process
    return Slurm(tmp_path)


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def test_the_job_is_requeued_without_the_node_that_srun_could_not_reach(
    slurm: Slurm, rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.srun(FAILED, 233)
    rundir.write("state.json", {"round": 3, "restarts": 2, "requeues": 1, "strikes": []})
    assert conclude.conclude(rundir, ENVIRON, 233) == 0
    why = "srun could not start an agent on n4, and has ended the agents on the other nodes"
    assert f"elastic_hpc: requeue: {why}\n" in capsys.readouterr().err
    assert "update JobId=7 NodeList=n1,n2,n3" in slurm.asked, "its completion does not wait for n4"
    assert "requeue incomplete 7" in slurm.asked
    assert [body["node"] for body in rundir.unfit()] == ["n4"], "which the next run avoids"
    assert rundir.read("state.json") == {"round": 3, "restarts": 2, "requeues": 2, "strikes": []}
    assert [event["reason"] for event in rundir.events()] == [why]
    assert (rundir.verdict(0) or {})["outcome"] == "requeue"


def test_the_job_is_requeued_even_if_slurm_has_noticed_the_loss_by_then(slurm: Slurm, rundir: RunDir) -> None:
    slurm.job(nodes="n[1-3]")
    assert conclude.conclude(rundir, ENVIRON, 233) == 0
    assert "--nodes=3 --ntasks=3" in (slurm.folder / "started").read_text()
    assert "requeue incomplete 7" in slurm.asked


@pytest.mark.parametrize("max_requeues", [0, 5])
def test_the_job_is_requeued_at_most_max_requeues_times(slurm: Slurm, rundir: RunDir, max_requeues: int) -> None:
    slurm.srun(FAILED, 233)
    rundir.write("state.json", {"requeues": max_requeues})
    assert conclude.conclude(rundir, ENVIRON, 233, max_requeues=max_requeues) == 233
    assert not (slurm.folder / "started").exists()


def test_agents_that_end_normally_end_the_job_as_usual(
    slurm: Slurm, rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conclude.conclude(rundir, ENVIRON, 1) == 1, "srun reaches all nodes"
    assert "the agents left no verdict; srun ended with exit code 1" in capsys.readouterr().err
    slurm.srun("srun: error: Unable to create step for job 7: Invalid job id specified\n", 1)
    assert conclude.conclude(rundir, ENVIRON, 1) == 1, "nothing is known of the nodes"
    assert rundir.verdict(0) is None


def test_no_node_is_blamed_for_a_launch_that_fails_on_all_nodes(slurm: Slurm, rundir: RunDir) -> None:
    slurm.srun("".join(FAILED.replace("n4", f"n{node}") for node in range(1, 5)), 1)
    assert conclude.conclude(rundir, ENVIRON, 1) == 1
    assert not [*rundir.unfit()]


def test_a_cancelled_job_is_not_requeued(slurm: Slurm, rundir: RunDir) -> None:
    slurm.srun(FAILED, 233)
    slurm.job(state="COMPLETING")
    assert conclude.conclude(rundir, ENVIRON, 137) == 137
    assert not (slurm.folder / "started").exists()
