"""Slurm's warning before the time limit or a preemption: from the batch script to the agent that leads, or will lead.
Agents may still be starting, or about to elect another leader. So the batch script writes the warning to the run
directory, where every leader of this run looks, and sends a request to the leader over the network, which is faster and
needs no file system.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

from elastic_hpc import slurm
from elastic_hpc.environment import JOIN
from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.nodes import joiner
from elastic_hpc.network.client import ask_leader, ask_to_leave
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import job_name, run_number

_PAUSE = 1.0


def pass_on(rundir: RunDir, environ: Mapping[str, str]) -> None:
    """Called by the batch script when its warning came. Returns when a leader has accepted the warning, when this run
    has its verdict, or when the batch script is gone.
    """
    script, reason = os.getppid(), slurm.warning_reason(job_name(environ))
    while not ask(rundir, environ, reason) and not _is_over(rundir, environ) and os.getppid() == script:
        time.sleep(_PAUSE)


def ask(rundir: RunDir, environ: Mapping[str, str], reason: str) -> bool:
    """Write the warning, and send it to the leader once. Returns whether the leader has accepted the warning."""
    if JOIN in environ:  # the warning of a joiner is for its node alone
        with contextlib.suppress(ElasticError):
            ask_to_leave(rundir, joiner(environ["SLURM_JOB_ID"]), reason)
            return True
        return False
    run = run_number(environ)
    with contextlib.suppress(OSError):  # the disk may be full
        rundir.write_warning(run, reason)
    with contextlib.suppress(ElasticError):
        ask_leader(rundir, "drain", reason, run=run)
        return True
    return False


def _is_over(rundir: RunDir, environ: Mapping[str, str]) -> bool:
    with contextlib.suppress(ElasticError, OSError):
        return JOIN not in environ and rundir.verdict(run_number(environ)) is not None
    return False
