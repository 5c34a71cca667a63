"""Job steps of their own: to act in when the job has lost its batch host, and with it srun, and for agents anew."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

from elastic_hpc.environment import AGAIN, CONTINUE, FIRST_JOB, FIRST_RUN, JOIN
from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import show_job
from elastic_hpc.slurm.nodes import expand

_STEP_NAME = "elastic-conclude"
_AGENT_NAME = "elastic-agent"
# A node's part of a step ends when its daemon has given up telling srun, 12 to 17 seconds if srun's node is lost. Slurm
# goes on listing a step that ended on the other nodes before it noticed the loss.
_STEP_SECONDS = 20
_GIVE_UP_SECONDS = 3
# Slurm tells them to the batch script, and a step inherits them; for srun they mean nothing.
_OF_THE_JOB = (
    *("SLURM_ARRAY_", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "SLURM_SUBMIT_"),
    *(JOIN, AGAIN, CONTINUE, FIRST_RUN, FIRST_JOB),  # ours
)


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for an srun with --jobid: without what an enclosing step, or the allocation's options, would make of
    its step. ``salloc --gpus-per-task=1`` for example would leave an agent one GPU of its node.
    """
    return {k: v for k, v in environ.items() if k.startswith(_OF_THE_JOB)} | client.clean_environment(environ)


def start_step(
    job_id: str, node: str, command: Sequence[str], log: Path, environ: Mapping[str, str] = os.environ
) -> None:
    """Run ``command`` on ``node`` in a job step that goes on when the caller's step ends; its output goes to ``log``.

    For the requeue of a job that lost its batch host, and with it srun: the step of the agents then takes 10 to 20
    seconds to end after its last process, too long for ``requeue``. In a step of its own, ``command`` can wait for that
    with ``wait_until_alone``. Returns when it runs. ``job_id`` is SLURM_JOB_ID, also in arrays. Raises SlurmError.
    """
    # Neither memory nor GPUs: all are the agents'.
    _start(job_id, node, _STEP_NAME, ["--gres=none"], command, environ, log)


def start_agent(
    job_id: str,
    node: str,
    command: Sequence[str],
    environ: Mapping[str, str],
    log: Path,
    cpus_per_task: str | None = None,
) -> None:
    """Run ``command``, an agent, on ``node`` of the job in the place of one that died, in a job step of its own.

    It has what the job was granted there, GPUs too, though the first step has them still. ``environ`` is the whole of
    what an agent of this job was started with, or more; what Slurm says of a step in it is that of the new one, with
    one node and one task. Otherwise as ``start_step``. If the node has lost power, SlurmError says so after 12 seconds,
    or at once when Slurm has taken the node from the job.
    """
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"]
    if cpus_per_task is not None:
        options.append(f"--cpus-per-task={cpus_per_task}")
    _start(job_id, node, _AGENT_NAME, options, command, environ, log)


def _start(
    job_id: str,
    node: str,
    name: str,
    options: Sequence[str],
    command: Sequence[str],
    environ: Mapping[str, str],
    log: Path,
) -> None:
    """Return when ``command`` is started, or raise SlurmError when it never will be: the shell in front of it says that
    it is there and waits for the word to go on, which is given only if that comes in time.
    """
    shell = ["sh", "-c", 'log=$1; shift; echo started; read -r go && exec "$@" >>"$log" 2>&1 </dev/null', "sh"]
    step = ["srun", f"--jobid={job_id}", f"--job-name={name}", "--overlap", "--no-kill"]
    step += ["--nodes=1", "--ntasks=1", f"--nodelist={node}", "--mem=0", "--mpi=none", *options]
    inherited = step_environment(environ)
    try:
        said = log.open("ab")  # srun outlives the caller
    except OSError as error:
        raise SlurmError(f"{log}: {error.strerror}") from None
    with said:
        before = said.tell()
        process = client.ask(*step, *shell, str(log), *command, environ=inherited, stdin=subprocess.PIPE, stderr=said)
    assert process.stdin
    assert process.stdout
    problem = "it ended before it had started"
    with process.stdin, process.stdout:
        try:
            if _hears(process.stdout, b"started\n"):
                os.write(process.stdin.fileno(), b"go\n")
                threading.Thread(target=process.wait, daemon=True).start()  # no zombie while the caller lives
                return
            process.wait(_GIVE_UP_SECONDS)
        except TimeoutError:
            problem = f"not started in {client.SECONDS} s"
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
    _give_up(process)
    raise SlurmError(f"srun --jobid={job_id} --nodelist={node}: {_complaint(log, before) or problem}")


def _hears(said: IO[bytes], line: bytes) -> bool:
    """Wait for ``line``, after what a prolog of the site says; False if the end comes first. Raises TimeoutError."""
    end, heard = time.monotonic() + client.SECONDS, b""
    while line not in heard:
        if not select.select([said], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        if not (more := os.read(said.fileno(), 4096)):
            return False
        heard += more
    return True


def _give_up(process: subprocess.Popen[bytes]) -> None:
    """Let srun end the step. If its node does not answer, that is done when it does."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GIVE_UP_SECONDS)
    process.kill()
    process.wait()


def _complaint(log: Path, before: int) -> str:
    """What srun has complained of in ``log``, which others may write too."""
    try:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return client.condensed("\n".join(line for line in lines if re.match("srun: (error|fatal):", line)))


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
