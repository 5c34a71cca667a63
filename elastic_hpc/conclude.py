"""What is done about the end of a run: by the batch script, or by an agent when nobody else is left."""

from __future__ import annotations

import signal
import sys
import time
from datetime import timedelta

from elastic_hpc import slurm
from elastic_hpc.decide import Policy
from elastic_hpc.env import AgentEnv
from elastic_hpc.errors import SlurmError
from elastic_hpc.rundir import RunDir

REQUEUE_DELAY = timedelta(seconds=8)
"""Start time asked for after a requeue. It must lie beyond the job's completion, else Slurm puts it two minutes off."""


def conclude(rundir: RunDir, job: str, run: int, status: int) -> int:
    """Act on the verdict of ``run`` (SLURM_RESTART_COUNT); the answer is the batch script's exit code.

    ``status`` is srun's exit code; it counts only where the agents left no verdict.
    """
    verdict = rundir.read("verdict.json")
    if verdict is None or verdict["run"] != run:
        print(f"elastic_hpc: the agents left no verdict; srun ended with exit code {status}", file=sys.stderr)
        return status or 1
    print(f"elastic_hpc: {verdict['outcome']}: {verdict['reason']}", file=sys.stderr)
    if verdict["outcome"] == "requeue" and not verdict.get("acted"):
        return _requeue(job)
    return 1 if verdict["outcome"] == "failed" else 0


def requeue_without_leader(rundir: RunDir, env: AgentEnv, round: int, policy: Policy) -> None:
    """The leader is lost: bring the job back, unless the record shows that it lives and only this node is cut off.

    Survivors wait for their turn, in node order; the first one's requeue ends the others. The loss is charged as the
    leader would have done.
    """
    time.sleep(2 * policy.heartbeat_timeout + 3 * min(env.node, 20))  # SIGTERM from another's requeue ends this wait
    state = rundir.read("state.json") or {}
    if state.get("round", 0) > round or (rundir.read("verdict.json") or {}).get("run") == env.run:
        return
    restarts, requeues = state.get("restarts", 0), state.get("requeues", 0)
    verdict = {"outcome": "requeue", "reason": "the head is lost", "failure": None, "run": env.run, "time": time.time()}
    if restarts >= policy.max_restarts or requeues >= policy.max_requeues:
        verdict |= {"outcome": "failed", "reason": "the head is lost; no restart or no requeue is left"}
    else:
        restarts, requeues = restarts + 1, requeues + 1
    budgets = {"round": round, "restarts": restarts, "requeues": requeues}
    rundir.append_event(time.time(), "verdict", {**verdict, **budgets, "node": env.name})
    rundir.write("state.json", {**budgets, "run": env.run})
    rundir.write("verdict.json", {**verdict, **budgets})
    if verdict["outcome"] == "requeue" and _requeue(env.job) == 0:
        rundir.write("verdict.json", {**verdict, **budgets, "acted": True})  # the batch script, if it lives, need not


def _requeue(job: str) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue itself sends it, and the start time comes after
    try:
        problem = slurm.requeue(job, start_after=REQUEUE_DELAY)
    except SlurmError as error:
        print(
            f"elastic_hpc: the job cannot be requeued: {error}; submit it again, the training goes on from its last "
            "checkpoint",
            file=sys.stderr,
        )
        return 1
    if problem:
        print(f"elastic_hpc: requeued, but with Slurm's own delay of about two minutes: {problem}", file=sys.stderr)
    return 0
