"""The environment of a job on a real Slurm: the code of its submission, set-up lines, and agents that do not see
Slurm's commands, as in a container.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND

Submit = Callable[..., Job]
TOOL = str(Path(sys.executable).with_name("elastic-hpc"))

# Trains until it gets a drain request; after the requeue it is done.
TRAIN = """\
import os, time
from pathlib import Path
import torch.distributed as dist
from elastic_hpc.training import drain_requested, report_progress
dist.init_process_group("gloo")
dist.barrier()  # a rank that ends at once must not close connections that others are still making
print("{version} in", os.getcwd(), flush=True)
step = 0
while "SLURM_RESTART_COUNT" not in os.environ and not drain_requested():
    dist.barrier()
    step += 1
    report_progress(step)
    (Path(os.environ["ELASTIC_HPC_RUN_DIR"]) / f"trains.{{os.environ['ELASTIC_HPC_ROUND']}}").touch()
    time.sleep(0.1)
dist.destroy_process_group()
"""

# In its own mount namespace the command sees no client of Slurm: empty files cover the clients.
HIDE = """\
for name in srun scontrol sbatch squeue scancel; do mount --bind /dev/null "$(command -v "$name")" || exit 9; done
exec "$@"
"""
HIDDEN = """\
{{% set agent_command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "{hide}"] + agent_command %}}
{{% include "elastic.sbatch.j2" %}}
"""


def drain(fresh: Cluster, job: Job, round: int = 1) -> None:
    """Return as soon as ``round`` trains."""
    wait_for(f"round {round} to train", (job.run_dir / f"trains.{round}").exists)
    fresh.exec([TOOL, "drain", str(job.run_dir)])


@ON_DEMAND
def test_a_snapshot_runs_as_submitted_also_after_a_requeue_whatever_is_edited_meanwhile(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = folder / "sub" / "train.py"
    fresh.exec(["mkdir", "sub"], cwd=folder)
    script.write_text(TRAIN.format(version="as submitted"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", f"safe.directory={folder}"]
    for command in (["init", "--quiet", "--initial-branch=topic"], ["add", "sub"], ["commit", "--quiet", "-m", "x"]):
        fresh.exec([*git, *command], cwd=folder)
    revision = fresh.exec([*git, "rev-parse", "HEAD"], cwd=folder).stdout.strip()
    script.write_text(TRAIN.format(version="as submitted, and not committed"))

    job = submit("--nodes", "1", "--snapshot", "--hold", "--chdir", "sub", script="train.py")
    script.write_text("raise SystemExit('edited after the submission')\n")
    assert list(folder.glob("elastic-logs/.submission.*"))
    fresh.exec(["scontrol", "release", job.id])
    drain(fresh, job)
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()

    assert [event["run"] for event in job.events("start")] == [0, 1]
    here = job.run_dir / "code" / "sub"
    assert job.worker_output() == f"as submitted, and not committed in {here}\n" * 2
    assert not list(folder.glob("elastic-logs/.submission.*"))
    facts = json.loads((job.run_dir / "code.json").read_text())
    values = [facts[name] for name in ("folder", "revision", "branch", "dirty", "snapshot")]
    assert values == [str(folder / "sub"), revision, "topic", True, True]
    assert '+print("as submitted, and not committed in' in (job.run_dir / "code.diff").read_text()


def test_agents_without_slurms_commands_survive_a_lost_node_and_the_batch_script_requeues_the_job(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    (folder / "hide.sh").write_text(HIDE)
    (folder / "hidden.j2").write_text(HIDDEN.format(hide=folder / "hide.sh"))
    (folder / "train.py").write_text(TRAIN.format(version="trains"))
    job = submit("--nodes", "2:3", "--template", "./hidden.j2", script="train.py")
    wait_for("training", (job.run_dir / "trains.1").exists)
    fresh.mini("kill", "n3")
    drain(fresh, job, round=2)
    assert job.wait_event("verdict")["outcome"] == "requeue"
    fresh.wait_noticed("n3")
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()

    assert [event["nodes"] for event in job.events("round")][:2] == [["n1", "n2", "n3"], ["n1", "n2"]]
    assert [event["run"] for event in job.events("start")] == [0, 1]
    assert not job.events("growth_problem")
    log = (job.run_dir / "logs" / "0.agent-n1.log").read_text()
    assert log.count("Slurm's commands are not here: no agent restarts") == 1
    assert "submit it yourself" not in log
    assert "Traceback" not in log + job.output()


def test_setup_lines_reach_agents_and_workers_and_the_python_option_chooses_the_interpreter(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    fresh.exec([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (folder / "show.py").write_text(
        "import os, shutil, sys\n"
        "print(sys.prefix, os.environ['VIRTUAL_ENV'], shutil.which('python'), os.environ['ELSE'])\n"
    )
    setup = ["--nodes", "1", "--setup", "source venv/bin/activate", "--setup", "export ELSE=x; false"]
    plain = submit(*setup, script="show.py")
    named = submit(*setup, "--python", "python", script="show.py")
    wrong = submit("--nodes", "1", "--python", "/usr/bin/python3", script="show.py")
    ended = [job.wait_state("COMPLETED", "FAILED") for job in (plain, named, wrong)]
    assert ended == ["COMPLETED", "COMPLETED", "FAILED"]
    rest = f"{folder}/venv {folder}/venv/bin/python x\n"
    assert plain.worker_output() == f"{sys.prefix} {rest}"
    assert named.worker_output() == f"{folder}/venv {rest}"
    outputs = {job.id: (folder / f"slurm-{job.id}.out").read_text() for job in (plain, wrong)}
    assert "elastic_hpc: exit code 1 of --setup export ELSE=x; false" in outputs[plain.id].replace("'", "")
    assert "No module named 'elastic_hpc'" in outputs[wrong.id]
    assert "the agents left no verdict; srun ended with exit code 1" in outputs[wrong.id]
