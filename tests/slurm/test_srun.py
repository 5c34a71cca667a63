"""``elastic-srun`` inside a real allocation."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import COUNTS, ROOT, Cluster, wait_for
from on_demand import ON_DEMAND

from elastic_hpc.cli import agents
from elastic_hpc.record.rundir import RunDir

SRUN = str(Path(sys.executable).with_name("elastic-srun"))
TRAIN = str(ROOT / "examples" / "train_digits.py")


def salloc(*options: str) -> list[str]:
    return ["salloc", "--quiet", *options]


def test_a_job_in_an_allocation_is_shown_live_and_ends_with_its_verdict(fresh: Cluster, folder: Path) -> None:
    done = fresh.exec([*salloc("--nodes=3"), SRUN, TRAIN, "--epochs", "2"], cwd=folder, timeout=120)
    assert "accuracy" in done.stdout
    assert "[rank0]: " in done.stdout
    assert done.stderr.count("finished: all workers finished") == 1, "the leader says it, once"
    (run_dir,) = (folder / "elastic-logs").iterdir()
    assert done.stderr.endswith(f"elastic-srun: elastic-hpc why {run_dir} explains the run\n")
    events = RunDir(run_dir).events()
    assert [event["world_size"] for event in events if event["event"] == "round"] == [3]
    assert (run_dir / "logs" / "0.1" / "n1.rank0.log").exists()


def test_granted_gpus_determine_the_number_of_workers_and_a_subset_of_the_nodes_can_be_used(
    fresh: Cluster, folder: Path
) -> None:
    script = folder / "gpus.py"
    script.write_text(
        "import os\n"
        "print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')))\n"
    )
    allocated = salloc("--nodes=3", "--gpus-per-node=2")
    done = fresh.exec([*allocated, SRUN, "--nodes", "2", "--tee", "all", str(script)], cwd=folder, timeout=120)
    assert sorted(done.stdout.splitlines()) == [f"[rank{rank}]: {rank} 4 2 0,1" for rank in range(4)]


def test_a_failure_is_reported_and_gives_exit_code_1(fresh: Cluster, folder: Path) -> None:
    script = folder / "broken.py"
    script.write_text("raise SystemExit(7)\n")
    done = fresh.exec(
        [*salloc("--nodes=2"), SRUN, "--max-restarts", "0", str(script)], cwd=folder, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "exit code 7; all 0 restarts (--max-restarts) are used up" in done.stderr


@ON_DEMAND
def test_when_the_batch_script_is_lost_with_the_head_training_ends_and_nothing_keeps_the_allocation(
    fresh: Cluster, folder: Path
) -> None:
    command = shlex.join([SRUN, "--nodes", "2:4", COUNTS])
    wrapped = ["sbatch", "--parsable", "--nodes=4", "--no-kill", f"--wrap={command}"]
    (folder / "hold").touch()
    job = fresh.exec(wrapped, cwd=folder).stdout.strip()
    (run_dir,) = wait_for("its run directory", lambda: list((folder / "elastic-logs").glob("*")))
    wait_for("training", (run_dir / "steps.jsonl").exists)
    fresh.mini("kill", "n1")
    (folder / "hold").unlink()
    wait_for("the verdict", (run_dir / "verdict.json").exists)
    fresh.wait_noticed("n1")
    wait_for("the end", lambda: fresh.job_field(job, "JobState") == "CANCELLED", 120)
    assert json.loads((run_dir / "verdict.json").read_text())["outcome"] == "finished"
    assert fresh.job_field(job, "Restarts") == "0"


def test_ctrl_c_stops_all_workers_in_an_orderly_way(fresh: Cluster, folder: Path) -> None:
    (folder / "hold").touch()
    command = fresh.command([*salloc("--nodes=2"), SRUN, COUNTS], cwd=folder)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        steps = wait_for("training", lambda: list((folder / "elastic-logs").glob("*/steps.jsonl")))
        wait_for("its processes", lambda: fresh.processes("counts.py", "n2"))
        (tool,) = fresh.running("elastic-srun", "login")
        os.kill(tool, signal.SIGINT)  # the workers may save and stop; these do not listen
        wait_for("the request", lambda: "save-and-stop" in str(RunDir(steps[0].parent).events()))
        time.sleep(agents._SAME)  # sooner, it would count as the same request
        os.kill(tool, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "stopped by the user" in errors
    assert json.loads((steps[0].parent / "verdict.json").read_text())["reason"] == "stopped by the user"
    for node in ("n1", "n2"):
        wait_for(f"no process on {node}", lambda node=node: not fresh.in_jobs(node), 30)
