"""The verdict on a run whose agents have left none, given by the batch script when srun has ended."""

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


def reinstate(rundir: RunDir, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The verdict that a leader has withdrawn, which holds again: that leader, which continued without the srun of the
    batch script, is lost. The verdict is recorded once more. None if no verdict was withdrawn.
    """
    with contextlib.suppress(ElasticError, OSError):
        if verdict := rundir.withdrawn(run_number(environ)):
            counters = {name: verdict[name] for name in ("round", "restarts", "requeues")}
            state = rundir.read("state.json") or {}
            _record(rundir, environ, verdict, {name: max(state.get(name, 0), counters[name]) for name in counters})
            return verdict
    return None


def judge(rundir: RunDir, environ: Mapping[str, str], max_requeues: int) -> tuple[dict[str, Any] | None, list[str]]:
    """The verdict ``requeue``, which is recorded, and the nodes that srun cannot reach, which the next run avoids: srun
    then ends the agents that it has started on the other nodes, so that none of them can give a verdict. None if srun
    reaches all nodes, if Slurm cannot be asked, or if the job has been requeued ``max_requeues`` times.

    To be called when srun has failed.
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
    with contextlib.suppress(OSError):  # the job is requeued nevertheless
        for node in nodes:
            rundir.write_unfit(node, time.time(), "srun could not start an agent there")
        _record(rundir, environ, verdict, counters)
    return verdict, nodes


def _record(
    rundir: RunDir, environ: Mapping[str, str], verdict: Mapping[str, Any], counters: Mapping[str, int]
) -> None:
    """Write ``verdict``, and the job's ``counters``. Raises ElasticError and OSError."""
    now = time.time()
    rundir.write("state.json", {**(rundir.read("state.json") or {}), **counters})
    append_event(rundir.path, environ["SLURMD_NODENAME"], now, "verdict", verdict)
    rundir.write("verdict.json", {**verdict, "run": run_number(environ), "time": now})
