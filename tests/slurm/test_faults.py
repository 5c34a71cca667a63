"""Faults x moments on a real Slurm. Of the whole matrix some pairs run each time; ELASTIC_HPC_ALL_FAULTS=1 runs all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from _jobs import wrong_steps
from conftest import Cluster, Job, wait_for
from faults import NODES, OF_MORE, OF_WORKERS, PROVOKED, Fault, Scene, reason

Submit = Callable[..., Job]
EVERY = 10
INJECTED = "RuntimeError: injected"

MOMENTS = ("start", "forming", "training", "checkpoint", "end")
ALL = [(f, m) for f in (*OF_WORKERS, *OF_MORE) for m in MOMENTS if m != "forming" or f not in OF_WORKERS]
ELSEWHERE = {"worker_SIGKILL", "agent_SIGKILL", "power_loss", "head_power_loss", "head_agent_SIGKILL"}
"""Injected each time by test_recovery.py, agents are killed by test_grow.py."""
RELATIVES = {"partition_of_one", "partition_of_the_head", "partition_of_half", "shared_directory_read_only"}
"""Left to the whole matrix: each differs little from one that is injected each time."""
SOME = [
    (fault, moments[number % len(moments)])
    for number, fault in enumerate((*OF_WORKERS, *OF_MORE))
    for moments in [[moment for each, moment in ALL if each is fault]]
    if fault.name not in ELSEWHERE | RELATIVES
]


def hold(scene: Scene) -> None:
    """Wait until the whole world has come to the moment, and stays there. A round is being formed while the leader
    waits for one node's workers to be stopped.
    """
    held = "training" if scene.moment == "forming" else scene.moment
    wait_for(f"the moment: {scene.moment}", lambda: len(list(scene.data.glob(f"at.{held}.1.*"))) == len(NODES))
    if scene.moment == "forming":
        scene.asleep = [scene.agent("n2")]
        os.kill(scene.asleep[0], signal.SIGSTOP)
        scene.touch("raise.1.3")
        scene.job.wait_event("restart")


@pytest.mark.parametrize(
    ("fault", "moment"), ALL if os.environ.get("ELASTIC_HPC_ALL_FAULTS") else SOME, ids=lambda v: getattr(v, "name", v)
)
def test_training_goes_on_after(fault: Fault, moment: str, submit: Submit, fresh: Cluster, folder: Path) -> None:
    script = Path(shutil.copy(Path(__file__).with_name("matrix.py"), folder))
    (folder / f"hold.{'training' if moment == 'forming' else moment}.1").touch()
    with contextlib.ExitStack() as end:
        prepared = fault.prepare(fresh, folder, end) if fault.prepare else None
        environ = [word for variable in fault.environ for word in ("--env", variable)]
        # nobody is lost in these, also not the node that stands still while a round is formed
        patience = ["--heartbeat-timeout", "20"] if moment == "forming" and fault.cause in {PROVOKED, None} else []
        job = submit("--nodes", "2:4", *environ, *patience, script=script)
        job.folder = fresh.seen_from_login(folder)
        scene = Scene(fresh, job, folder, moment, end, prepared)
        try:
            hold(scene)
            fault.strike(scene)
        finally:
            scene.release()
        if "n1" in fault.off:  # the job completes when Slurm knows that its first node is lost
            job.wait_event("verdict")
            fresh.wait_noticed(*fault.off)
        assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=240) == "COMPLETED", job.output()[-3000:]
        steps, events, verdict = scene.steps(), job.events(), job.verdict()
    assert wrong_steps(steps, EVERY) == []
    assert steps[-1]["step"] == 60
    rounds = [step["round"] for step in steps]
    assert rounds == sorted(rounds), "an older world wrote after a newer one"
    reasons = [event["reason"] for event in events if event["event"] == "restart"]
    if moment == "forming" and fault.cause in {PROVOKED, None}:
        assert [INJECTED in reason for reason in reasons] == [True]
    elif fault.cause is None:
        assert reasons == []
    else:
        assert any(fault.cause in reason(event) for event in events), reasons
    assert verdict["outcome"] == "finished"
    for node in {*NODES} - {*fault.off}:
        wait_for(f"no process on {node}", lambda node=node: not fresh.in_jobs(node), 30)
