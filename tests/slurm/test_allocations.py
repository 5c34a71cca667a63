"""``elastic-srun`` in an allocation that it shares with other commands, or that was not made for it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import Cluster, wait_for

SRUN = str(Path(sys.executable).with_name("elastic-srun"))
ALL_RANKS = [SRUN, "--tee", "all"]
NAMES = ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@pytest.fixture
def script(folder: Path) -> str:
    """Writes which rank runs on which node, when all ranks have started."""
    path = folder / "where.py"
    path.write_text(f"import os\nprint(os.uname().nodename, *(os.environ.get(name) for name in {NAMES}))\n")
    return str(path)


def ranks_output(text: str) -> list[str]:
    return sorted(line.partition("]: ")[2] for line in text.splitlines() if line.startswith("[rank"))


def test_inside_a_step_that_has_all_resources_a_job_still_runs_on_all_nodes_with_all_gpus(
    fresh: Cluster, folder: Path, script: str
) -> None:
    first = f"{shlex.join([*ALL_RANKS, script])}; touch over"
    here = f'if [ "$SLURM_PROCID" = 0 ]; then {first}; else until [ -e over ]; do sleep 0.1; done; fi'
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--gpus-per-node=2", "bash", "-c", here]
    done = fresh.exec(["salloc", "--quiet", "--nodes=2", "--gpus-per-node=2", *step], cwd=folder, timeout=120)
    assert ranks_output(done.stdout) == [f"n{1 + rank // 2} {rank} 4 0,1 1" for rank in range(4)]


def test_several_jobs_at_once_share_an_allocation_on_the_same_or_on_different_nodes(
    fresh: Cluster, folder: Path, script: str
) -> None:
    run = shlex.join([*ALL_RANKS, "-N", "2", "-w"])
    commands = "".join(f"{run} {nodes} {script} & " for nodes in ("n[1-2]", "n[1-2]", "n[3-4]"))
    commands += f"{shlex.join([SRUN, '--nodelist', 'n9', script])}; wait"
    done = fresh.exec(["salloc", "--quiet", "--nodes=4", "bash", "-c", commands], cwd=folder, timeout=120)
    first, second = ["n1 0 2 None 1", "n2 1 2 None 1"], ["n3 0 2 None 1", "n4 1 2 None 1"]
    assert ranks_output(done.stdout) == sorted(2 * first + second)
    assert done.stderr.count("finished: all workers finished") == 3
    assert "--nodelist n9: expected nodes of the allocation, which has n1, n2, n3, n4" in done.stderr
    runs = [path for path in (folder / "elastic-logs").iterdir() if (path / "verdict.json").exists()]
    assert len(runs) == 3


def test_in_an_allocation_made_for_many_tasks_each_agent_has_its_whole_node(
    fresh: Cluster, folder: Path, script: str
) -> None:
    tasks = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem-per-cpu=500"]
    command = ["salloc", "--quiet", *tasks, "env", "SRUN_CPUS_PER_TASK=1", *ALL_RANKS, script]
    done = fresh.exec(command, cwd=folder, timeout=120)
    assert ranks_output(done.stdout) == ["n1 0 2 None 2", "n2 1 2 None 2"]


@pytest.mark.parametrize(
    ("allocation", "complaint"),
    [
        (["--nodes=1", ":", "--nodes=2"], "a heterogeneous allocation of 2 components: expected nodes of one kind"),
        (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"], "an allocation with --gpus-per-task: "),
    ],
)
def test_an_unusable_allocation_is_refused_immediately(
    fresh: Cluster, folder: Path, script: str, allocation: list[str], complaint: str
) -> None:
    done = fresh.exec(["salloc", "--quiet", *allocation, SRUN, script], cwd=folder, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (folder / "elastic-logs").exists()


def test_a_users_own_batch_script_passes_the_warning_on_and_the_workers_save(fresh: Cluster, folder: Path) -> None:
    listens, batch = folder / "listens.py", folder / "batch.sh"
    listens.write_text(
        "import time\nfrom elastic_hpc.training import drain_requested\nopen('trains', 'w')\n"
        "while not drain_requested():\n    time.sleep(0.05)\nopen('saved', 'w')\n"
    )
    batch.write_text(f"""#!/bin/bash
#SBATCH --nodes=2 --no-kill --signal=B:URG@60
trap 'kill -TERM "$pid"' URG
{shlex.join([SRUN, str(listens)])} &
pid=$!
wait "$pid" || wait "$pid"
""")
    job = fresh.exec(["sbatch", "--parsable", str(batch)], cwd=folder).stdout.strip()
    wait_for("training", (folder / "trains").exists)
    fresh.exec(["scancel", "--batch", "--signal=URG", job])
    wait_for("the end", lambda: fresh.job_field(job, "JobState") == "FAILED")
    (verdict,) = (folder / "elastic-logs").glob("*/verdict.json")
    assert json.loads(verdict.read_text())["reason"] == "stopped by the user; the workers saved and stopped"
    assert (folder / "saved").exists()
