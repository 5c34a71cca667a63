"""How a job ends in Slurm's records, compared with the job's own record, on a cluster that is configured as sites do
it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND
from test_drain import IGNORES_UNTIL_TOLD, TOOL
from test_site_bed import ended

Submit = Callable[..., Job]
EATS = """\
# The first time, rank 1 uses more memory than its job has on a node.
import os
import torch.distributed as dist
dist.init_process_group("gloo")
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    held = [bytearray(b"x" * (64 << 20)) for _ in range(100)]
dist.barrier()
"""


@pytest.fixture(scope="module")
def cluster(site: Cluster) -> Cluster:
    return site


def why(job: Job) -> str:
    return job.cluster.exec([TOOL, "why", job.id], cwd=job.folder).stdout


@ON_DEMAND
def test_slurm_records_a_timeout_for_a_training_that_finishes_after_the_time_limit_and_why_reports_it(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    """The training has ignored all warnings, and finishes between Slurm's SIGTERM and SIGKILL."""
    script = folder / "until_told.py"
    script.write_text(IGNORES_UNTIL_TOLD)
    job = submit("--nodes", "2", "--time", "1", "--signal", "USR2@5", "--grace", "120", script=script)
    wait_for("the time limit", lambda: fresh.job_field(job.id, "Reason") == "TimeLimit", 150)
    (folder / "finish").touch()
    wait_for("the verdict", lambda: job.events("verdict"))
    job.wait_state("TIMEOUT")
    assert [event["outcome"] for event in job.events("verdict")] == ["finished"]
    assert ended(fresh, job.id)[-1].startswith("TIMEOUT")
    assert "the training finished, but Slurm recorded TIMEOUT" in why(job)


def test_a_joiner_that_has_left_is_recorded_as_completed(submit: Submit, fresh: Cluster, folder: Path) -> None:
    script = Path(shutil.copy(Path(__file__).with_name("steady.py"), folder))
    sleep = ["sbatch", "-t5", "-N3", "-wn[2-4]", "--exclusive", "-o/dev/null", "--parsable", "--wrap=sleep 300"]
    other = fresh.exec(sleep, cwd=folder).stdout.strip()
    wait_for("the other job", lambda: fresh.job_field(other, "JobState") == "RUNNING")
    job = submit("--nodes", "1:2", "--time", "10", "--grow", "--grow-every", "1", "--exclusive", script=script)
    joiner = job.wait_event("joiners")["jobs"][0]
    fresh.exec(["scancel", other])
    wait_for("two nodes", lambda: [len(event["nodes"]) for event in job.events("round")][-1:] == [2])
    (folder / "finish").touch()
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert ended(fresh, joiner) == ["COMPLETED|0:0"]


def test_a_worker_that_ran_out_of_memory_is_reported_and_no_node_is_blamed(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    (folder / "eats.py").write_text(EATS)
    job = submit("--nodes", "2", "--mem", "1200", script=folder / "eats.py")
    assert job.wait_state("COMPLETED", "FAILED", "OUT_OF_MEMORY") == "COMPLETED", job.output()
    assert ended(fresh, job.id) == ["COMPLETED|0:0"]
    step = ["sacct", "-n", "-P", f"--jobs={job.id}.0", "--format=state,exitcode"]
    assert fresh.exec(step).stdout.strip() == "OUT_OF_MEMORY|0:125", "as docs/limits.md says"
    told = why(job)
    assert "killed by SIGKILL (out of memory; request more, for example --mem)" in told
    assert "Slurm recorded" not in told
    assert "administrator" not in told
