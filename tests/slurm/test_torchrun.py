"""A stock ``torchrun`` under srun, with this project's rendezvous."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

from conftest import COUNTS, Cluster, Job, wait_for

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
BATCH = f"""#!/bin/bash
#SBATCH --nodes=4 --no-kill
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --no-kill --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=1 {quote(TORCHRUN)} --rdzv-backend=elastic-hpc \\
    --rdzv-endpoint="$head" --rdzv-id="$SLURM_JOB_ID" --nnodes=2:4 --max-restarts=0 --log-dir=torchrun \\
    {quote(COUNTS)}
"""


def finished(job: Job) -> bool:
    return (job.run_dir / "verdict.json").exists() and job.verdict()["outcome"] == "finished"


def test_torchruns_go_on_without_a_node_that_loses_power_then_without_that_of_the_endpoint(
    fresh: Cluster, folder: Path
) -> None:
    script = folder / "batch.sh"
    script.write_text(BATCH)
    (folder / "hold").touch()
    job = Job(fresh, fresh.exec(["sbatch", "--parsable", str(script)], cwd=folder).stdout.strip(), folder)
    job.wait_steps(10)
    fresh.mini("kill", "n4")
    job.wait_steps(5, round=2)
    assert [(event["node"], event["reason"]) for event in job.events("lost")] == [("n4", "nothing heard for 5 s")]
    fresh.mini("kill", "n1")
    (folder / "hold").unlink()
    wait_for("the end of training", lambda: finished(job), 120)
    assert job.events("take_over")
    assert job.worlds() == [4, 3, 2]
    job.assert_steps_contiguous(10)
    assert job.verdict()["restarts"] == 2
