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

PAGE = f"""#!/bin/bash
#SBATCH --job-name=multinode-example
#SBATCH --nodes=3
#SBATCH --ntasks=3
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=1

nodes=( $( scontrol show hostnames $SLURM_JOB_NODELIST ) )
nodes_array=($nodes)
head_node=${{nodes_array[0]}}
head_node_ip=$(srun --nodes=1 --ntasks=1 -w "$head_node" hostname --ip-address)

echo Node IP: $head_node_ip
export LOGLEVEL=INFO

srun {quote(TORCHRUN)} \\
--nnodes 3 \\
--nproc_per_node 1 \\
--rdzv_id $RANDOM \\
--rdzv_backend c10d \\
--rdzv_endpoint $head_node_ip:29500 \\
{quote(COUNTS)} 50 10
"""
"""As on PyTorch's own page."""


def finished(job: Job) -> bool:
    return (job.run_dir / "verdict.json").exists() and job.verdict()["outcome"] == "finished"


def test_torchruns_continue_without_a_node_that_loses_power_and_then_without_the_node_of_the_endpoint(
    fresh: Cluster, folder: Path
) -> None:
    script = folder / "batch.sh"
    script.write_text(BATCH)
    (folder / "hold").touch()
    job = Job(fresh, fresh.exec(["sbatch", "--parsable", str(script)], cwd=folder).stdout.strip(), folder)
    job.wait_steps(10)
    fresh.mini("kill", "n4")
    job.wait_steps(5, round=2)
    assert [(event["node"], event["reason"]) for event in job.events("lost")] == [("n4", "no heartbeat for 5 s")]
    fresh.mini("kill", "n1")
    (folder / "hold").unlink()
    wait_for("the end of training", lambda: finished(job), 120)
    assert job.events("take_over")
    assert job.worlds() == [4, 3, 2]
    job.assert_steps_contiguous(10)
    assert job.verdict()["restarts"] == 2


def test_the_batch_script_of_pytorchs_page_survives_the_loss_of_a_node_and_ignores_modules_in_the_folder(
    fresh: Cluster, folder: Path
) -> None:
    """The folder has modules with the names of library modules, which the agents must not import. The shell has
    defaults for srun, which must not apply to the agents' step.
    """
    for name in sys.stdlib_module_names - {"__main__"}:
        (folder / f"{name}.py").write_text("raise SystemExit('of the working directory')")
    (folder / "job.sh").write_text(PAGE)
    (folder / "hold").touch()
    sbatch = [str(Path(sys.executable).with_name("elastic-sbatch")), "--parsable", "--from-batch=job.sh", "-N", "2:3"]
    done = fresh.exec(["env", f"--chdir={folder}", "SRUN_CPUS_PER_TASK=99", *sbatch])
    assert "job.sh line 5: changed --gpus-per-task=1 to --gpus-per-node=1" in done.stderr
    job = Job(fresh, done.stdout.strip(), folder)
    job.wait_steps(10)
    fresh.mini("kill", "n3")
    job.wait_steps(5, round=2)
    (folder / "hold").unlink()
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED"
    assert job.worlds() == [3, 2]
    assert fresh.job_field(job.id, "JobName") == "multinode-example"
