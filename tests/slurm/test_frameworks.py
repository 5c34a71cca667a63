"""Scripts of the frameworks on a real Slurm: they continue at another size, and leave the requeue to the job."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Cluster, Job, wait_for
from on_demand import ON_DEMAND

from elastic_hpc.record.worker_logs import Logs, Wanted

TOOL = str(Path(sys.executable).with_name("elastic-hpc"))
Submit = Callable[..., Job]
STEPS = 1000


def output_of(job: Job, round: int) -> str:
    """The output of rank 0 in a round."""
    return job.written(Wanted(ranks=(0,), rounds=(round,), streams=("out",)))


def starts(job: Job) -> list[tuple[int, int]]:
    """World size of each round, and the step after which the round continued."""
    found = []
    for line in Logs(job.run_dir / "logs", Wanted(ranks=(0,), streams=("out",))).written():
        begin = re.fullmatch(r"(\d+) workers, continuing after step (\d+)", line.text)
        if begin:
            found.append((int(begin[1]), int(begin[2])))
    return found


def wait_for_step(job: Job, round: int, least: int) -> None:
    def far_enough() -> bool:
        return any(int(step) >= least for step in re.findall(r"^step (\d+)", output_of(job, round), re.MULTILINE))

    wait_for(f"step {least} in round {round} of {job.folder.name}", far_enough, 120)


def finished(job: Job, steps: int) -> None:
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=200) == "COMPLETED", job.output()[-3000:]
    accuracy = re.search(rf"^step {steps}: accuracy (\S+)$", job.worker_output(), re.MULTILINE)
    assert accuracy
    assert float(accuracy[1]) > 0.95


@ON_DEMAND
def test_lightning_continues_after_a_loss_and_after_a_drain_and_the_job_is_requeued_once(
    submit: Submit, fresh: Cluster
) -> None:
    script = ROOT / "examples" / "lightning_digits.py"
    job = submit("--nodes", "2:3", script=script, args=["--steps", str(STEPS)])
    wait_for_step(job, 1, 100)
    fresh.mini("kill", "n3")
    wait_for_step(job, 2, 120)
    before = fresh.processes("srun", "n1")
    fresh.exec([TOOL, "drain", str(job.run_dir)])
    wait_for("a second start", lambda: job.events("start")[1:])
    # srun would wait for the lost node, and then cancel the step of the second run
    assert not set(before) & set(fresh.processes("srun", "n1"))
    finished(job, STEPS)
    (_, first), (second_size, second), (_, third) = starts(job)
    assert first == 0
    assert second_size == 2
    assert second >= 100
    assert second % 20 == 0
    assert third > second
    assert fresh.job_field(job.id, "Restarts") == "1"
    assert (job.verdict()["restarts"], job.verdict()["requeues"]) == (1, 0)
    complaints = job.written(Wanted(streams=("err",)))
    assert "MEMBER: 1/3" in complaints  # the output has Lightning's own messages
    assert "auto-requeueing" not in complaints


def goes_on(job: Job, steps: int) -> None:
    finished(job, steps)
    (first_size, first), (second_size, second) = starts(job)
    assert (first_size, first, second_size) == (2, 0, 1)
    assert second >= 60
    assert second % 20 == 0
    assert (job.verdict()["restarts"], job.verdict()["requeues"]) == (1, 0)


@pytest.fixture
def example(submit: Submit) -> Callable[[str, str, int], Job]:
    def start(name: str, nodes: str, steps: int) -> Job:
        script = ROOT / "examples" / f"{name}_digits.py"
        return submit("--nodes", "1:2", f"--nodelist={nodes}", script=script, args=["--steps", str(steps)])

    return start


@ON_DEMAND
def test_accelerate_and_trainer_continue_at_another_size(
    example: Callable[[str, str, int], Job], fresh: Cluster
) -> None:
    accelerate, trainer = example("accelerate", "n[1-2]", 2000), example("trainer", "n[3-4]", 2000)
    for job, node in ((accelerate, "n2"), (trainer, "n4")):
        wait_for_step(job, 1, 80)
        fresh.mini("kill", node)
    goes_on(accelerate, 2000)
    goes_on(trainer, 2000)


@ON_DEMAND
def test_fsdp_continues_at_another_size(example: Callable[[str, str, int], Job], fresh: Cluster) -> None:
    fsdp = example("fsdp", "n1,n3", 240)
    wait_for_step(fsdp, 1, 80)
    fresh.mini("kill", "n3")
    goes_on(fsdp, 240)
