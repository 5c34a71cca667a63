"""Starts job steps beside the first step: to conclude a job that has lost its batch host, and with it srun, to replace
an agent that died, to find the nodes that srun cannot reach, and for a shell of the user.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

from elastic_hpc.environment import AGAIN, CONTINUE, FIRST_JOB, FIRST_RUN, JOIN
from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import expand, show_job
from elastic_hpc.slurm.joining import joiners

# Without its log file, as in a read-only run directory, the command runs nevertheless.
_SHELL = """log=$1; shift; ( : >>"$log" ) 2>/dev/null || log=/dev/null
echo started; read -r go && echo going && exec "$@" >>"$log" 2>&1 </dev/null"""
_STEP_NAME = "elastic-conclude"
_AGENT_NAME = "elastic-agent"
# If srun's node is lost, a node's part of a step ends when the node's daemon has given up reaching srun, after 12 to 17
# seconds. Slurm keeps listing a step that ended on the other nodes before Slurm noticed the loss.
_STEP_SECONDS = 20
_GIVE_UP_SECONDS = 3
_POLL, _POLL_AT_MOST = 0.5, 8.0  # seconds between two queries of the steps: an eighth of the time so far
# Prefixes of variables that Slurm sets for the batch script and that its steps inherit; srun ignores them.
_OF_THE_JOB = (
    *("SLURM_ARRAY_", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "SLURM_SUBMIT_"),
    *(JOIN, AGAIN, CONTINUE, FIRST_RUN, FIRST_JOB),  # ours
)


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for an srun with --jobid, without the variables by which an enclosing step, or the options of the
    allocation, would change the new step. For example, ``salloc --gpus-per-task=1`` would leave an agent one GPU.
    """
    return {k: v for k, v in environ.items() if k.startswith(_OF_THE_JOB)} | client.clean_environment(environ)


def start_step(
    job_id: str, node: str, command: Sequence[str], log: Path, environ: Mapping[str, str] = os.environ
) -> None:
    """Run ``command`` on ``node`` in a job step that continues when the caller's step ends; its output goes to ``log``.

    For the requeue of a job that lost its batch host, and with it srun: the step of the agents then takes 10 to 20
    seconds to end after its last process, too long for ``requeue``. In a step of its own, ``command`` can wait for that
    end with ``wait_until_alone``. Returns when ``command`` runs. ``job_id`` is SLURM_JOB_ID, also in arrays. Raises
    SlurmError.
    """
    # Neither memory nor GPUs: the agents have all of them.
    _start(job_id, node, _STEP_NAME, ["--gres=none"], command, environ, log)


def start_agent(
    job_id: str,
    node: str,
    command: Sequence[str],
    environ: Mapping[str, str],
    log: Path,
    cpus_per_task: str | None = None,
) -> None:
    """Run ``command``, an agent, on ``node`` of the job in place of an agent that died, in a job step of its own.

    The agent gets all that the job was granted on the node, GPUs too, although the first step still has them.
    ``environ`` must have at least all variables with which an agent of this job was started; the variables of the new
    step, which has one node and one task, replace Slurm's variables about the step. Otherwise as ``start_step``. If the
    node has lost power, raises SlurmError after 12 seconds, or at once when Slurm has taken the node from the job.
    """
    options = ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"]
    if cpus_per_task is not None:
        options.append(f"--cpus-per-task={cpus_per_task}")
    _start(job_id, node, _AGENT_NAME, options, command, environ, log)


def enter(job_id: str, node: str, command: Sequence[str], *, terminal: bool) -> NoReturn:
    """Replace this process by ``command`` on ``node`` of the job, in a job step of its own that has all that the job
    was granted there, also what other steps use. ``terminal``: the command gets a terminal. Raises SlurmError.
    """
    step = ["srun", f"--jobid={job_id}", "--job-name=elastic-shell", "--overlap", "--nodes=1", "--ntasks=1"]
    step += [f"--nodelist={node}", "--mem=0", "--mpi=none", "--cpu-bind=none", "--quiet", *["--pty"] * terminal]
    try:
        os.execvpe(step[0], [*step, *command], step_environment(os.environ))  # noqa: S606 - as in client.ask
    except OSError as error:
        raise SlurmError(f"srun: {error.strerror}") from None


def nodes_of(job: str) -> dict[str, str]:
    """The nodes of the running ``job`` and of its joiners, each with the SLURM_JOB_ID of the job that brought it.
    Raises SlurmError.
    """
    shown = show_job(job)
    brought = {joiner.node: joiner.id for joiner in joiners(job) if joiner.node and joiner.state == "RUNNING"}
    return {**dict.fromkeys(expand(shown.nodes), shown.id), **brought}


def agent_steps(job_id: str) -> dict[str, str]:
    """The job steps of ``start_agent`` that have not ended, by node. Leaves out steps whose node Slurm has taken from
    the job, although Slurm keeps listing them. Raises SlurmError.
    """
    listed = [line.split(maxsplit=2) for line in _steps(job_id, "%i %N %j")]
    steps = {words[1]: words[0] for words in listed if words[2:] == [_AGENT_NAME]}
    nodes = expand(show_job(job_id).nodes) if steps else ()
    return {node: step for node, step in steps.items() if node in nodes}


def unreached(job: str, environ: Mapping[str, str]) -> list[str]:
    """The nodes that the running ``job`` had when it called srun, and that srun cannot reach: Slurm has taken them from
    the job since, or a job step that does nothing does not start there. If there are such nodes, that step takes 2 to
    12 seconds. ``environ``: the environment of the batch script. Raises SlurmError, also if ``job`` does not run, or
    srun reaches no node.
    """
    shown = show_job(job)
    if shown.state != "RUNNING":
        raise SlurmError(f"job {job} is {shown.state}")
    nodes = expand(shown.nodes)
    taken = set(expand(environ.get("SLURM_JOB_NODELIST", ""))).difference(nodes)
    count = len(nodes)
    step = ["srun", f"--jobid={environ['SLURM_JOB_ID']}", "--job-name=elastic-reach", "--overlap", "--no-kill"]
    step += [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--mem=0", "--gres=none", "--mpi=none"]
    process = client.ask(*step, "true", environ=step_environment(environ))
    try:
        client.answer(process, client.SECONDS)
    except TimeoutError:
        raise SlurmError(f"{' '.join(step)}: no answer in {client.SECONDS} s") from None
    except SlurmError as error:
        failed = set(re.findall(r"Task launch for \S+ failed on node ([^\s:]+)", str(error)))
        if failed.issuperset(nodes):
            raise
        taken |= failed
    return sorted(taken)


def _steps(job: str, form: str) -> list[str]:
    return client.run("squeue", "--noheader", "--steps", f"--jobs={job}", f"--format={form}").splitlines()


def _start(
    job_id: str,
    node: str,
    name: str,
    options: Sequence[str],
    command: Sequence[str],
    environ: Mapping[str, str],
    log: Path,
) -> None:
    """Return when ``command`` is started, or raise SlurmError when it never will be. A shell on the node reports that
    it has started, and starts ``command`` when it reads ``go``, which the caller sends only if the report comes in
    time. The shell acknowledges ``go``: only then may the caller end srun.
    """
    shell = ["sh", "-c", _SHELL, "sh"]
    step = ["srun", f"--jobid={job_id}", f"--job-name={name}", "--overlap", "--no-kill"]
    step += ["--nodes=1", "--ntasks=1", f"--nodelist={node}", "--mem=0", "--mpi=none", *options]
    inherited = step_environment(environ)
    try:
        output = log.open("ab")
    except OSError:
        output = open(os.devnull, "ab")  # noqa: SIM115
    with output:
        before = output.tell()
        process = client.ask(*step, *shell, str(log), *command, environ=inherited, stdin=subprocess.PIPE, stderr=output)
    assert process.stdin
    assert process.stdout
    problem = "it ended before it had started"
    with process.stdin, process.stdout:
        try:
            if _reads(process.stdout, b"started\n"):
                os.write(process.stdin.fileno(), b"go\n")
                if _reads(process.stdout, b"going\n"):
                    _leave_alone(process)
                    return
            process.wait(_GIVE_UP_SECONDS)
        except TimeoutError:
            problem = f"not started in {client.SECONDS} s"
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
    _give_up(process)
    raise SlurmError(f"srun --jobid={job_id} --nodelist={node}: {_complaint(log, before) or problem}")


def _reads(stdout: IO[bytes], line: bytes) -> bool:
    """Wait for ``line``, perhaps after the output of a prolog; False if stdout ends first. Raises TimeoutError."""
    end, received = time.monotonic() + client.SECONDS, b""
    while line not in received:
        if not select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        if not (more := os.read(stdout.fileno(), 4096)):
            return False
        received += more
    return True


def _leave_alone(srun: subprocess.Popen[bytes]) -> None:
    """End ``srun``; its step continues. Slurm kills all processes that the caller has started when the caller's own
    step ends (proctrack/cgroup). The process by which srun watches itself may then cancel the new step, so this kills
    that process first.
    """
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{srun.pid}/task/{srun.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    srun.kill()
    srun.wait()


def _give_up(process: subprocess.Popen[bytes]) -> None:
    """Let srun end the step. If the node does not answer, Slurm ends the step when the node answers again."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GIVE_UP_SECONDS)
    process.kill()
    process.wait()


def _complaint(log: Path, before: int) -> str:
    """The errors of srun in ``log``, to which other processes may write too."""
    try:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return client.condensed("\n".join(line for line in lines if re.match("srun: (error|fatal):", line)))


def wait_until_alone(job: str, step: str, *, deadline: timedelta, deputy_of: str | None = None) -> bool:
    """Wait until Slurm knows that the batch host of ``job`` is lost and ``step`` (SLURM_STEP_ID) is its last step.

    Does not wait for another step of ``start_step``, unless ``step`` is its deputy, and the job still has the node
    ``deputy_of``, where that step runs. Returns False if ``deadline`` comes first: a requeue then takes longer.
    """
    begin = time.monotonic()
    while True:
        with contextlib.suppress(SlurmError):  # unknown does not mean alone
            nodes = expand((shown := show_job(job)).nodes)
            lost = shown.batch_host not in nodes
            others = _other_steps(job, step)
            first_acts = deputy_of in nodes and _STEP_NAME in others
            if lost and not first_acts and (others <= {_STEP_NAME} or time.monotonic() - begin > _STEP_SECONDS):
                return True
        if time.monotonic() - begin > deadline.total_seconds():
            return False
        waited = time.monotonic() - begin
        time.sleep(random.uniform(0.75, 1.25) * min(max(waited / 8, _POLL), _POLL_AT_MOST))  # noqa: S311 - jitter


def _other_steps(job: str, step: str) -> set[str]:
    """Names of the job steps beside ``step``, without the steps of the batch script and of Slurm itself."""
    found = [line.partition(" ") for line in _steps(job, "%i %j")]
    numbers = [(id.rpartition(".")[2], name) for id, _, name in found]
    return {name for number, name in numbers if number.isdecimal() and number != step}
