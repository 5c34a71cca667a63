"""Faults x moments on a real Slurm, with a script that restarts from its checkpoint, and with a script that continues
in place. Some pairs of the matrix run each time; ELASTIC_HPC_ALL_FAULTS=1 runs all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from _jobs import wrong_steps
from conftest import Cluster, Job, wait_for
from faults import NODES, OF_MORE, OF_WORKERS, PROVOKED, Fault, Scene, reason
from torch_214 import IN_PLACE, TORCH_214

Submit = Callable[..., Job]
EVERY = 10

MOMENTS = ("start", "forming", "training", "checkpoint", "end")
ALL = [
    (fault, moment)
    for fault in (*OF_WORKERS, *OF_MORE)
    for moment in MOMENTS
    if (moment != "forming" or fault not in OF_WORKERS)
    and (moment != "end" or fault.name != "pair_cut")  # no worker notices a cut then
]
ELSEWHERE = {"worker_SIGKILL", "agent_SIGKILL", "power_loss", "head_power_loss", "head_agent_SIGKILL"}
"""Faults that test_recovery.py injects in every run; test_joiner_jobs.py kills agents."""
RELATIVES = {
    *("partition_of_one", "partition_of_the_head", "partition_of_half", "shared_directory_read_only"),
    *("store_port_taken", "name_server_silent", "worker_exception", "clock_jump", "agent_SIGSTOP"),
    *("head_then_next_head", "pair_cut"),
}
"""Faults that only the whole matrix has: each differs little from a fault that every run injects, or takes a minute."""
SOME = [
    (fault, moments[number % len(moments)])
    for number, fault in enumerate((*OF_WORKERS, *OF_MORE))
    for moments in [[moment for each, moment in ALL if each is fault]]
    if fault.name not in ELSEWHERE | RELATIVES
]
NOT_IN_PLACE = {
    # only rank 0 is held while it writes a checkpoint: the other workers do not look for these faults
    ("worker_exception", "checkpoint"),
    ("worker_out_of_memory", "checkpoint"),
    # two nodes train while the killed worker restarts, and the loss of one of two leaves no majority: a requeue
    ("head_then_next_head", "forming"),
}
ALL_IN_PLACE = [
    (fault, moment)
    for fault, moment in ALL
    if fault.ends is not None
    and moment != "start"  # there is no worker to keep yet
    and (fault.name, moment) not in NOT_IN_PLACE
]
SOME_IN_PLACE = {
    ("agent_SIGKILL", "checkpoint"),
    ("power_loss", "forming"),
    ("head_power_loss", "training"),
}
WHOLE_MATRIX = bool(os.environ.get("ELASTIC_HPC_ALL_FAULTS"))


def hold(scene: Scene, ranks: int) -> None:
    """Wait until ``ranks`` workers have reached the moment, where they stay. For ``forming``, the leader waits until
    one node's workers are stopped.
    """
    held = "training" if scene.moment == "forming" else scene.moment
    wait_for(f"the moment: {scene.moment}", lambda: len(list(scene.data.glob(f"at.{held}.1.*"))) == ranks)
    if scene.moment == "forming":
        worker, scene.asleep = scene.worker("n4"), [scene.agent("n2")]
        os.kill(scene.asleep[0], signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)  # not an exception, which takes seconds on a busy machine: n2 would be lost
        scene.job.wait_event("restart")


def struck(
    fault: Fault, moment: str, script: Path, options: list[str], ranks: int, submit: Submit, fresh: Cluster
) -> Scene:
    """A job that finishes although ``fault`` strikes at ``moment``, where ``ranks`` workers are held."""
    folder = script.parent
    (folder / f"hold.{'training' if moment == 'forming' else moment}.1").touch()
    with contextlib.ExitStack() as end:
        prepared = fault.prepare(fresh, folder, end) if fault.prepare else None
        environ = [word for variable in fault.environ for word in ("--env", variable)]
        # these faults lose no node, not even the node that is frozen while the round forms
        patience = ["--heartbeat-timeout", "20"] if moment == "forming" and fault.cause in {PROVOKED, None} else []
        job = submit("--nodes", "2:4", *environ, *patience, *fault.options, *options, script=script)
        job.folder = fresh.seen_from_login(folder)
        scene = Scene(fresh, job, folder, moment, end, prepared)
        try:
            hold(scene, ranks)
            fault.strike(scene)
        finally:
            scene.release()
        if "n1" in fault.off:  # the job completes when Slurm knows that its first node is lost
            job.wait_event("verdict")
            fresh.wait_noticed(*fault.off)
        assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=240) == "COMPLETED", job.output()[-3000:]
        steps, events, verdict = scene.steps(), job.events(), job.verdict()
    assert steps[-1]["step"] == 60
    rounds = [step["round"] for step in steps]
    assert rounds == sorted(rounds), "an older world wrote after a newer one"
    reasons = [event["reason"] for event in events if event["event"] == "restart"]
    if moment == "forming" and fault.cause in {PROVOKED, None}:
        # in place, the node of the killed worker may rejoin while the others train
        assert [PROVOKED in reason for reason in reasons if "more node(s) joined" not in reason] == [True]
    elif fault.cause is None:
        assert reasons == []
    else:
        assert any(fault.cause in reason(event) for event in events), reasons
    assert verdict["outcome"] == "finished"
    for node in {*NODES} - {*fault.off}:
        wait_for(f"no process on {node}", lambda node=node: not fresh.in_jobs(node), 30)
    return scene


@pytest.mark.parametrize(("fault", "moment"), ALL if WHOLE_MATRIX else SOME, ids=lambda v: getattr(v, "name", v))
def test_training_continues_after_a_fault(
    fault: Fault, moment: str, submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = Path(shutil.copy(Path(__file__).with_name("matrix.py"), folder))
    scene = struck(fault, moment, script, [], len(NODES), submit, fresh)
    assert wrong_steps(scene.steps(), EVERY) == []


@IN_PLACE
@pytest.mark.parametrize(
    ("fault", "moment"),
    [pair for pair in ALL_IN_PLACE if WHOLE_MATRIX or (pair[0].name, pair[1]) in SOME_IN_PLACE],
    ids=lambda v: getattr(v, "name", v),
)
def test_the_other_workers_keep_their_processes_and_every_step_after(
    fault: Fault, moment: str, submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = Path(shutil.copy(Path(__file__).with_name("matrix_live.py"), folder / "matrix.py"))
    ranks = 1 if moment == "checkpoint" else len(NODES)
    scene = struck(fault, moment, script, ["--python", TORCH_214], ranks, submit, fresh)
    assert fault.ends is not None
    kept = {*NODES} - {*fault.ends}
    if moment == "forming":  # a worker of n4 was killed there, and no worker of n3 needs to be killed for a new round
        kept = kept - {"n4"} | ({"n3"} if fault.cause == PROVOKED else set())
    pids, rounds = defaultdict(set), defaultdict(set)
    for step in scene.steps():
        pids[step["node"]].add(step["pid"])
        if step["node"] in kept:
            rounds[step["step"]].add(step["round"])
    assert {node: len(pids[node]) for node in kept} == dict.fromkeys(kept, 1)
    assert {step: len(done) for step, done in rounds.items()} == dict.fromkeys(range(1, 61), 1)
    counted = [path.read_text() for path in folder.glob("counted.*")]
    assert {*counted} == {"60"}
    last = max(round for done in rounds.values() for round in done)
    over = last <= max(1, len(fault.off))  # the (second) loss was noticed after the last step
    assert over or not list(folder.glob("read.*")), "a worker has read a checkpoint"
