"""The verdict on a run in which srun could not reach a node. srun then ends the agents that it has started on the other
nodes, so that no agent can give a verdict.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.record.events import append_event
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import job_name, run_number


def judge(rundir: RunDir, environ: Mapping[str, str], max_requeues: int) -> tuple[dict[str, Any] | None, list[str]]:
    """The verdict ``requeue``, which is recorded, and the nodes that srun cannot reach, which the next run avoids. None
    if srun reaches all nodes, if Slurm does not answer, or if the job has been requeued ``max_requeues`` times. The
    batch script calls this when srun has failed without a verdict of the agents.
    """
    try:
        state = rundir.read("state.json") or {}
        requeues = int(state.get("requeues", 0))
        nodes = slurm.unreached(job_name(environ), environ) if requeues < max_requeues else []
    except (ElasticError, SlurmError):
        return None, []
    if not nodes:
        return None, []
    reason = f"srun could not start an agent on {', '.join(nodes)}, and has ended the agents on the other nodes"
    counters = {"round": state.get("round", 0), "restarts": state.get("restarts", 0), "requeues": requeues + 1}
    verdict = {"outcome": "requeue", "cause": "node lost", "reason": reason, "failure": None, **counters}
    now, run = time.time(), run_number(environ)
    with contextlib.suppress(OSError):  # the job is requeued nevertheless
        for node in nodes:
            rundir.write_unfit(node, now, "srun could not start an agent there")
        rundir.write("state.json", {**state, **counters})
        append_event(rundir.path, environ["SLURMD_NODENAME"], now, "verdict", verdict)
        rundir.write("verdict.json", {**verdict, "run": run, "time": now})
    return verdict, nodes
