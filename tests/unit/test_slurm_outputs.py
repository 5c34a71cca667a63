"""Answers of different versions of Slurm. ``outputs/job-VERSION`` is a real version's answer about a job without a time
limit, whose comment and script contain text that looks like fields.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_hpc import slurm
from elastic_hpc.slurm import client

OUTPUTS = Path(__file__).parent / "outputs"


@pytest.mark.parametrize("version", sorted(path.name.partition("-")[2] for path in OUTPUTS.glob("job-*")))
def test_a_job_is_read_correctly_whatever_text_its_user_wrote(version: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "scontrol", lambda *_: (OUTPUTS / f"job-{version}").read_text())
    job = slurm.show_job("1")
    assert (job.id, job.state, job.restarts, job.may_requeue) == ("1", "RUNNING", 0, True)
    assert (job.partitions, job.nodes, job.batch_host, job.excluded) == (("main",), "n1", "n1", "")
    assert (job.account, job.qos, job.preempt_time, job.exit_code) == ("", "", "", "0:0")
    assert (job.folder, job.output) == ("/home/me/a b=c", "/home/me/a b=c/slurm-1.out")
    assert job.remaining is None
