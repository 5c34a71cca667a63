"""A job step of its own, to act in when the job has lost its batch host, and with it srun."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import show_job
from elastic_hpc.slurm.nodes import expand

_STEP_NAME = "elastic-conclude"
# A node's part of a step ends when its daemon has given up telling srun, 12 to 17 seconds if srun's node is lost. Slurm
# goes on listing a step that ended on the other nodes before it noticed the loss.
_STEP_SECONDS = 20


def start_step(job_id: str, node: str, command: Sequence[str], log: Path) -> None:
    """Run ``command`` on ``node`` in a job step that goes on when the caller's step ends; its output goes to ``log``.

    For the requeue of a job that lost its batch host, and with it srun: the step of the agents then takes 10 to 20
    seconds to end after its last process, too long for ``requeue``. In a step of its own, ``command`` can wait for that
    with ``wait_until_alone``. Returns when it runs. ``job_id`` is SLURM_JOB_ID, also in arrays. Raises SlurmError.
    """
    shell = ["sh", "-c", 'echo started; log=$1; shift; exec "$@" >>"$log" 2>&1', "sh", str(log), *command]
    step = ["srun", f"--jobid={job_id}", f"--job-name={_STEP_NAME}", "--overlap"]
    step += ["--nodes=1", "--ntasks=1", f"--nodelist={node}"]
    # Neither memory nor GPUs: all are the agents'. No MPI: nothing to talk to.
    process = client.ask(*step, "--mem=0", "--gres=none", "--mpi=none", "--no-kill", *shell)
    assert process.stdout
    if not select.select([process.stdout], [], [], client.SECONDS)[0]:
        client.end(process)
        raise SlurmError(f"srun --jobid={job_id}: no answer in {client.SECONDS} s")
    if process.stdout.readline() != b"started\n":
        raise SlurmError(client.answer(process, client.SECONDS) or f"srun --jobid={job_id}: the step ended at once")


def wait_until_alone(job: str, step: str, *, deadline: timedelta, deputy_of: str | None = None) -> bool:
    """Wait until ``step`` (SLURM_STEP_ID) is the last one of ``job``, whose batch host is lost, and Slurm knows it.
    Another step that ``start_step`` has started is not waited for, except by its deputy, while its node is there.

    False if that is not so at ``deadline``: a requeue then takes longer.
    """
    begin = time.monotonic()
    while True:
        with contextlib.suppress(SlurmError):  # unknown is not alone
            nodes = expand((shown := show_job(job)).nodes)
            lost = shown.batch_host not in nodes
            others = _other_steps(job, step)
            first_is_at_it = deputy_of in nodes and _STEP_NAME in others
            if lost and not first_is_at_it and (others <= {_STEP_NAME} or time.monotonic() - begin > _STEP_SECONDS):
                return True
        if time.monotonic() - begin > deadline.total_seconds():
            return False
        time.sleep(0.5)


def _other_steps(job: str, step: str) -> set[str]:
    """Names of the job steps beside ``step``, those of the batch script and of Slurm itself left out."""
    listed = client.run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i %j").splitlines()
    found = [line.partition(" ") for line in listed]
    others = [(each.rpartition(".")[2], name) for each, _, name in found]
    return {name for other, name in others if other.isdecimal() and other != step}
