"""Faults x moments on a real Slurm. Of the whole matrix some pairs run each time; ELASTIC_HPC_ALL_FAULTS=1 runs all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for

Submit = Callable[..., Job]
EVERY = 10

SCRIPT = """\
import json, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from elastic_hpc.training import Checkpoints, report_progress

run, round_ = Path(os.environ["ELASTIC_HPC_RUN_DIR"]), int(os.environ["ELASTIC_HPC_ROUND"])
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def at(moment):
    \"\"\"Say so; wait as long as the test holds that moment.\"\"\"
    (run / f"at.{moment}.{round_}.{rank}").touch()
    while (run / f"hold.{moment}.{round_}").exists():
        time.sleep(0.02)
    if (run / f"raise.{round_}.{rank}").exists():
        raise RuntimeError("injected")

at("start")
dist.init_process_group("gloo")
checkpoints = Checkpoints()
step = checkpoints.load(lambda path: int((path / "step").read_text())) or 0
record = open(run / "steps.jsonl", "a", buffering=1) if rank == 0 else None
while step < 60:
    dist.all_reduce(torch.ones(1))
    step += 1
    report_progress(step)
    if record:
        record.write(json.dumps({"step": step, "time": time.time(), "round": round_, "world_size": world_size}) + "\\n")
    if step % 10 == 0:
        with checkpoints.save(step) as path:
            if rank == 0:
                (path / "step").write_text(str(step))
            if step == 30:
                at("checkpoint")
    if step == 15:
        at("training")
    time.sleep(0.02)
at("end")
dist.destroy_process_group()
"""


@dataclass
class Scene:
    """A job of ours with four nodes, one of which is struck."""

    cluster: Cluster
    job: Job

    def agent(self, node: str) -> int:
        (pid,) = [p for p in self.cluster.processes("elastic_hpc.agent", node) if _is_python(p) and not _is_worker(p)]
        return pid

    def worker(self, node: str) -> int:
        (pid,) = [p for p in self.cluster.processes("matrix.py", node) if _is_worker(p)]
        return pid


def _is_python(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").resolve().name.startswith("python")


def _is_worker(pid: int) -> bool:
    return "elastic_hpc.agent" not in Path(f"/proc/{pid}/cmdline").read_text()


def kill_worker(scene: Scene) -> None:
    os.kill(scene.worker("n3"), signal.SIGKILL)


def raise_in_worker(scene: Scene) -> None:
    (scene.job.run_dir / "raise.1.2").touch()


def stop_worker(scene: Scene) -> None:
    os.kill(scene.worker("n3"), signal.SIGSTOP)


def kill_agent(scene: Scene) -> None:
    os.kill(scene.agent("n3"), signal.SIGKILL)


def kill_head_agent(scene: Scene) -> None:
    os.kill(scene.agent("n1"), signal.SIGKILL)


def freeze_agent(scene: Scene) -> None:
    pid = scene.agent("n3")
    os.kill(pid, signal.SIGSTOP)
    release(scene)
    scene.job.wait_event("round", 2)
    os.kill(pid, signal.SIGCONT)


def freeze_head_agent(scene: Scene) -> None:
    pid = scene.agent("n1")
    os.kill(pid, signal.SIGSTOP)
    release(scene)
    scene.job.wait_event("take_over")
    scene.job.wait_event("round", 2)
    os.kill(pid, signal.SIGCONT)


def power_off(*nodes: str) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        for node in nodes:
            scene.cluster.mini("kill", node)

    fault.__name__, fault.off = f"power_loss_of_{'_and_'.join(nodes)}", nodes  # type: ignore[attr-defined]
    return fault


def cut(*nodes: str) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        for node in nodes:
            scene.cluster.mini("cut", node)
        release(scene)
        scene.job.wait_event("round", 2)
        for node in nodes:
            scene.cluster.mini("heal", node)

    fault.__name__ = f"partition_of_{'_and_'.join(nodes)}"
    return fault


def release(scene: Scene) -> None:
    for path in scene.job.run_dir.glob("hold.*"):
        path.unlink()


CAUSES = {
    kill_worker: "killed by SIGKILL",
    raise_in_worker: "RuntimeError: injected",
    stop_worker: "stopped by a signal for 5 s",
    kill_agent: "n3 lost",
    kill_head_agent: "n1 lost",
    freeze_agent: "n3 lost: nothing heard for 5 s",
    freeze_head_agent: "n1 lost: nothing heard for 5 s",
    power_off("n3"): "n3 lost: nothing heard for 5 s",
    power_off("n1"): "n1 lost: nothing heard for 5 s",
    cut("n3"): "n3 lost: nothing heard for 5 s",
    cut("n1"): "n1 lost: nothing heard for 5 s",
}
MOMENTS = ("start", "training", "checkpoint", "end")
ALL = [(fault, moment) for fault in CAUSES for moment in MOMENTS]
SOME = [pair for number, pair in enumerate(ALL) if number % len(MOMENTS) == (number // len(MOMENTS)) % len(MOMENTS)]


@pytest.mark.parametrize(
    ("fault", "moment"),
    ALL if os.environ.get("ELASTIC_HPC_ALL_FAULTS") else SOME,
    ids=lambda value: getattr(value, "__name__", value),
)
def test_training_goes_on_after(
    fault: Callable[[Scene], None], moment: str, submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = folder / "matrix.py"
    script.write_text(SCRIPT)
    job = submit("--nodes", "2:4", script=script)
    fresh.exec(["mkdir", "-p", "-m", "700", str(job.run_dir)])
    fresh.exec(["touch", str(job.run_dir / f"hold.{moment}.1")])
    scene = Scene(fresh, job)
    wait_for(f"the moment: {moment}", lambda: len(list(job.run_dir.glob(f"at.{moment}.1.*"))) == 4, 90)
    fault(scene)
    release(scene)
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=240) == "COMPLETED", job.output()[-3000:]
    job.assert_steps_contiguous(EVERY)
    steps = job.steps()
    assert steps[-1]["step"] == 60
    rounds = [step["round"] for step in steps]
    assert rounds == sorted(rounds), "an older world wrote after a newer one"
    assert any(CAUSES[fault] in event["reason"] for event in job.events("restart")), job.events("restart")
    assert job.verdict()["outcome"] == "finished"
    for node in {"n1", "n2", "n3", "n4"} - set(getattr(fault, "off", ())):
        wait_for(f"no process on {node}", lambda node=node: not fresh.processes("matrix.py", node), 30)
