"""Workers save and stop before the time limit, on a preemption and at the user's request; and what follows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND

Submit = Callable[..., Job]
TOOL = str(Path(sys.executable).with_name("elastic-hpc"))

LISTENS = """\
# Does as many steps as its argument says; with a + it trains in its first run until it is told to save.
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from elastic_hpc.training import drain_requested, report_progress
dist.init_process_group("gloo")
run = Path(os.environ["ELASTIC_HPC_RUN_DIR"])
saved = run / "saved"
step, steps = int(saved.read_text()) if saved.exists() else 0, int(sys.argv[1])
last = float("inf") if sys.argv[1][0] == "+" and not saved.exists() else step + steps
drain_requested()
(run / f"training.{os.environ['ELASTIC_HPC_ROUND']}.{dist.get_rank()}").touch()
while step < last and not drain_requested():
    time.sleep(0.05)
    dist.barrier()
    step += 1
    report_progress(step)
if dist.get_rank() == 0:
    saved.write_text(str(step))
    print("saved step", step, flush=True)
(run / f"stopped.{os.environ['ELASTIC_HPC_ROUND']}.{dist.get_rank()}").write_text(str(step))
dist.barrier()
dist.destroy_process_group()
"""

IGNORES = """\
import os, signal, time
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(name, signal.SIG_IGN)
print("started", flush=True)
time.sleep(0 if int(os.environ["ELASTIC_HPC_ROUND"]) > 1 else 1000)
"""


IGNORES_UNTIL_TOLD = """\
# Heeds no signal, and finishes when there is a file.
import signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open("started", "a") as started:
    print("started", file=started)
while not Path("finish").exists():
    time.sleep(0.05)
"""

HANDLES = """\
# Has a job evaluate on its own node, and trains until its handler saves; the next run has nothing to do.
import os, signal, subprocess, sys, time
from pathlib import Path
import torch.distributed as dist
run, rank = Path(os.environ["ELASTIC_HPC_RUN_DIR"]), os.environ["RANK"]
def save(*_):
    (run / f"saved.{rank}").touch()
    sys.exit(143)
if not (run / f"saved.{rank}").exists():
    signal.signal(signal.SIGTERM, save)
    dist.init_process_group("gloo")
    if rank == "0":
        here = "--nodelist=" + os.environ["SLURMD_NODENAME"]
        done = subprocess.run(["sbatch", "--parsable", here, "evaluate.sh"], capture_output=True, text=True, check=True)
        Path("evaluation").write_text(done.stdout.strip())
    while True:
        dist.barrier()
        time.sleep(0.05)
"""

EVALUATE = "#!/bin/bash\ntouch evaluating\nuntil [ -e enough ]; do sleep 0.2; done\n"


@pytest.fixture
def listens(folder: Path) -> Path:
    script = folder / "listens.py"
    script.write_text(LISTENS)
    return script


@pytest.fixture
def ignores(folder: Path) -> Path:
    script = folder / "ignores.py"
    script.write_text(IGNORES)
    return script


def wait_training(job: Job, ranks: int, round: int = 1) -> None:
    wait_for(f"{ranks} ranks to train", lambda: len(list(job.run_dir.glob(f"training.{round}.*"))) == ranks, 60)


def stopped_at(job: Job, round: int, ranks: int) -> int:
    """The step at which all ranks of ``round`` have stopped."""
    found = wait_for(
        f"{ranks} ranks to stop",
        lambda: len(paths := list(job.run_dir.glob(f"stopped.{round}.*"))) == ranks and paths,
        60,
    )
    steps = {int(path.read_text()) for path in found}
    assert len(steps) == 1, "all ranks stop at the same step"
    return steps.pop()


def test_at_the_warning_all_ranks_save_the_same_step_and_the_job_continues_after_a_requeue(
    submit: Submit, fresh: Cluster, listens: Path
) -> None:
    job = submit("--nodes", "2:3", script=listens, args=["+20"])
    wait_training(job, 3)
    fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
    step = stopped_at(job, 1, 3)
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1", 60)
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert stopped_at(job, 2, 3) == step + 20
    first = next(event for event in job.events("verdict") if event["outcome"] == "requeue")
    assert (first["cause"], first["restarts"], first["requeues"]) == ("time limit", 0, 0)
    assert "the workers saved and stopped" in first["reason"]


@ON_DEMAND
def test_a_script_with_a_handler_saves_at_the_warning_and_a_job_that_it_submitted_to_its_node_keeps_running(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    (folder / "handles.py").write_text(HANDLES)
    (folder / "evaluate.sh").write_text(EVALUATE)
    job = submit("--nodes", "2", script=folder / "handles.py")
    wait_for("the evaluation", (folder / "evaluating").exists)
    fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert [(event["outcome"], event["restarts"]) for event in job.events("verdict")] == [
        ("requeue", 0),
        ("finished", 0),
    ]
    assert "the workers saved and stopped" in job.events("verdict")[0]["reason"]
    evaluation = Job(fresh, (folder / "evaluation").read_text(), folder)
    assert evaluation.wait_state("RUNNING", "COMPLETED", "FAILED", "CANCELLED") == "RUNNING"
    (folder / "enough").touch()
    assert evaluation.wait_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"


def test_a_script_that_ignores_all_signals_is_stopped_in_time_and_its_job_is_requeued(
    submit: Submit, fresh: Cluster, ignores: Path
) -> None:
    job = submit("--nodes", "2", "--grace", "4", script=ignores)
    wait_for("its workers", lambda: "started" in job.worker_output())
    fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    first = next(event for event in job.events("verdict") if event["outcome"] == "requeue")
    assert "did not stop within 4 s (--grace)" in first["reason"]


def test_the_time_limit_requeues_the_job_without_charge(submit: Submit, fresh: Cluster, listens: Path) -> None:
    def limit(minutes: int) -> None:
        fresh.mini("exec", "--root", "--", "scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")

    job = submit("--nodes", "2", "--time", "10", "--signal", "USR2@110", script=listens, args=["+20"])
    wait_training(job, 2)
    limit(2)  # so the warning is due ten seconds after the start
    job.wait_event("verdict")
    limit(10)
    assert job.wait_state("COMPLETED", "FAILED", "TIMEOUT", deadline=200) == "COMPLETED", job.output()
    outcomes = [(event["outcome"], event["cause"], event["requeues"]) for event in job.events("verdict")]
    assert outcomes[0] == ("requeue", "time limit", 0)
    assert outcomes[-1][0] == "finished"


def assert_completed_or_told(job: Job, partition: str) -> None:
    """Where preemption cancels, Slurm 24.05 and newer record PREEMPTED, whatever the job did afterwards; ``why``
    reports it.
    """
    state = job.wait_state("COMPLETED", "FAILED", "PREEMPTED", deadline=240)
    assert state == "COMPLETED" or (state, partition) == ("PREEMPTED", "lowcancel"), job.output()
    told = job.cluster.exec([TOOL, "why", job.id], cwd=job.folder).stdout
    assert ("the training finished, but Slurm recorded PREEMPTED" in told) == (state == "PREEMPTED")


@pytest.mark.site(ON_DEMAND)
@pytest.mark.parametrize("partition", [pytest.param("low", marks=ON_DEMAND), "lowcancel"])
def test_a_preempted_job_saves_and_returns(
    submit: Submit, fresh: Cluster, folder: Path, listens: Path, partition: str
) -> None:
    job = submit("--nodes", "4", "--partition", partition, script=listens, args=["+20"])
    wait_training(job, 4)
    other = fresh.exec(
        ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=srun sleep 3"], cwd=folder
    ).stdout.strip()
    step = stopped_at(job, 1, 4)
    wait_for("the other job", lambda: fresh.job_field(other, "JobState") == "COMPLETED", 60)
    assert stopped_at(job, 2, 4) == step + 20
    assert_completed_or_told(job, partition)
    assert [event["outcome"] for event in job.events("verdict")] == ["requeue", "finished"]
    assert job.verdict()["requeues"] == 0


@pytest.mark.parametrize("partition", ["low", pytest.param("lowcancel", marks=ON_DEMAND)])
def test_a_job_that_finishes_in_the_grace_time_of_a_preemption_is_completed_and_is_not_restarted(
    submit: Submit, fresh: Cluster, folder: Path, partition: str
) -> None:
    (folder / "ignores.py").write_text(IGNORES_UNTIL_TOLD)
    grace = ["exec", "--root", "--", "scontrol", "update", f"PartitionName={partition}"]
    fresh.mini(*grace, "GraceTime=120")
    try:
        job = submit("--nodes", "2", "--partition", partition, script=folder / "ignores.py")
        wait_for(
            "both workers", lambda: (folder / "started").exists() and (folder / "started").read_text().count("\n") == 2
        )
        nodes = fresh.job_field(job.id, "NodeList")
        fresh.exec(
            ["sbatch", "--partition=high", "--nodes=2", "--exclusive", f"--nodelist={nodes}", "--wrap=true"], cwd=folder
        )
        job.wait_event("request")
        (folder / "finish").touch()
        wait_for("the verdict", lambda: job.events("verdict"))
        assert_completed_or_told(job, partition)
        assert [event["outcome"] for event in job.events("verdict")] == ["finished"]
        assert (folder / "started").read_text().split() == ["started", "started"]
    finally:
        fresh.mini(*grace, "GraceTime=10")


def test_a_cancelled_job_is_never_requeued(submit: Submit, fresh: Cluster, listens: Path) -> None:
    job = submit("--nodes", "2", script=listens, args=["+1"])
    wait_training(job, 2)
    fresh.exec(["scancel", job.id])
    stopped_at(job, 1, 2)
    job.wait_state("CANCELLED", deadline=60)
    wait_for("no process", lambda: not fresh.in_jobs("n2"), 30)
    assert fresh.job_field(job.id, "Restarts") == "0"
    assert job.wait_state("CANCELLED", "PENDING", "RUNNING") == "CANCELLED"


def test_the_user_stops_a_job_after_its_checkpoint(submit: Submit, fresh: Cluster, listens: Path) -> None:
    job = submit("--nodes", "2", script=listens, args=["+1"])
    wait_training(job, 2)
    fresh.exec([TOOL, "stop", "--after-checkpoint", job.id], cwd=job.folder)
    stopped_at(job, 1, 2)
    assert job.wait_state("COMPLETED", "FAILED") == "FAILED"
    verdict = job.verdict()
    assert (verdict["outcome"], verdict["cause"]) == ("failed", "user")
    assert "the workers saved and stopped" in verdict["reason"]


def test_a_job_that_may_not_be_requeued_continues_as_a_new_job(submit: Submit, fresh: Cluster, listens: Path) -> None:
    job = submit("--nodes", "2", script=listens, args=["+20"])
    wait_training(job, 2)
    fresh.exec(["scontrol", "update", f"JobId={job.id}", "Requeue=0"])
    fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
    step = stopped_at(job, 1, 2)
    assert stopped_at(job, 2, 2) == step + 20
    wait_for("the end", lambda: job.verdict()["outcome"] == "finished")
    assert "continues in its place" in job.output()
    assert [event["run"] for event in job.events("start")] == [0, 1]


def test_a_requeued_job_that_the_user_stops_leaves_the_queue(submit: Submit, fresh: Cluster, listens: Path) -> None:
    job = submit("--nodes", "2", script=listens, args=["+1"])
    wait_training(job, 2)
    fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
    job.wait_state("PENDING", deadline=60)
    fresh.exec([TOOL, "stop", job.id], cwd=job.folder)
    assert job.wait_state("CANCELLED") == "CANCELLED"


def test_a_node_that_fails_its_preflight_is_excluded_and_remembered(
    submit: Submit, fresh: Cluster, folder: Path, listens: Path
) -> None:
    check = folder / "check.sh"
    check.write_text("#!/bin/sh\n[ $(hostname -s) != n2 ] || { echo 'the fan is broken'; exit 1; }\n")
    check.chmod(0o755)
    job = submit("--nodes", "2:3", "--preflight", str(check), script=listens, args=["5"])
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert job.events("round")[0]["nodes"] == ["n1", "n3"]
    (unfit,) = job.events("unfit")
    assert "n2 is not fit" in unfit["reason"]
    assert "the fan is broken" in unfit["reason"]
    state = json.loads((job.run_dir / "state.json").read_text())
    assert [strike["node"] for strike in state["strikes"]] == ["n2"]


@pytest.mark.parametrize("timeout", [["--hang-timeout", "8"], pytest.param([], id="auto", marks=ON_DEMAND)])
def test_hanging_workers_are_found_their_stacks_are_kept_and_training_continues(
    submit: Submit, fresh: Cluster, folder: Path, timeout: list[str]
) -> None:
    """With ``auto`` that takes five minutes after the leader has seen ten steps; it gets reports once a second."""
    script = folder / "hangs.py"
    script.write_text(
        "import os, time\nimport torch.distributed as dist\n"
        "from elastic_hpc.training import report_progress\n"
        "dist.init_process_group('gloo')\n"
        f"for step in range({40 if timeout else 120}):\n    report_progress(step)\n    time.sleep(0.2)\n"
        "def stuck_here():\n    time.sleep(1000)\n"
        "if os.environ['ELASTIC_HPC_ROUND'] == '1': stuck_here()\n"
    )
    job = submit("--nodes", "2", *timeout, script=script)
    assert job.wait_state("COMPLETED", "FAILED", deadline=150 if timeout else 480) == "COMPLETED", job.output()
    assert job.events("failure")[0]["kind"] == "hang"
    stacks = sorted(job.run_dir.glob("logs/0.1/*.stacks"))
    assert len(stacks) == 2
    assert all("stuck_here" in path.read_text() for path in stacks)
