"""Runs Slurm's commands and reads their answers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import IO

from elastic_hpc.errors import SlurmError

SECONDS = 60  # for an answer of slurmctld; Slurm's own clients give up after 10 to 30
# A variable with one of these prefixes changes what a command of Slurm does or what a program finds, or is left over
# from the job that calls us. The script already has the options from sbatch's variables (sbatch_environment). Our own
# variables mark the processes of an agent, which a new job must outlive, or belong to the calling job.
_SLURM = ("SLURM", "_SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SPANK_", "PMI")
_OURS = "ELASTIC_HPC_"
# Variables by which commands find and enter the cluster, and find our configuration.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "ELASTIC_HPC_CONFIG"})

# A user's defaults for tables and questions, which would change the answers. A job keeps them (clean_environment).
_FILTERS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_", "SACCT_", "SSTAT_", "SPRIO_")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a process outside the job of this process, if it has one, such as a job that it submits."""
    return {k: v for k, v in environ.items() if k in _KEPT or not k.startswith((*_SLURM, _OURS))}


def condensed(messages: str) -> str:
    """What a Slurm command wrote to stderr, as one line without the prefixes."""
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip() for line in messages.splitlines()]
    lines = [line for line in lines if not line.startswith("Try ")]  # the command's --help
    return "; ".join(dict.fromkeys(filter(None, lines)))


def records(shown: str) -> list[dict[str, str]]:
    """The output of ``scontrol show`` with ``--oneliner`` as records, for names and values without spaces. If a name
    has two values, the first counts: text that people write, such as the reason of a node, comes last.
    """
    return [dict(reversed(re.findall(r"(?<!\S)(\w+)=(\S*)", line))) for line in shown.splitlines()]


def scontrol(*arguments: str) -> str:
    return run("scontrol", *arguments)


def run(*command: str) -> str:
    try:
        return answer(ask(*command), SECONDS)
    except TimeoutError:
        raise SlurmError(f"{' '.join(command)}: no answer in {SECONDS} s") from None


def ask(
    *command: str,
    environ: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a command of Slurm, by default in this process's environment without variables that would change the
    answer.

    The requeue of a job sends SIGTERM to all processes of the job, also to the command that requests the requeue, so
    the command inherits a mask that blocks SIGTERM.
    """
    if environ is None:
        environ = {k: v for k, v in clean_environment(os.environ).items() if not k.startswith(_FILTERS)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environ,
            start_new_session=True,  # Ctrl-C does not stop a requeue half-way
        )
    except OSError as error:
        raise SlurmError(f"{' '.join(command)}: {error.strerror}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def answer(process: subprocess.Popen[bytes], seconds: float) -> str:
    """The stdout of ``process``. Raises SlurmError if the process fails; if it is late, ends it and raises
    TimeoutError.
    """
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise TimeoutError from None
    if process.returncode:
        assert isinstance(process.args, tuple)
        written = stdout if stderr is None else stderr
        reason = condensed(written.decode(errors="replace")) or f"exit code {process.returncode}"
        raise SlurmError(f"{' '.join(process.args)}: {reason}")
    return stdout.decode(errors="replace")


def answers(
    seconds: float, *commands: tuple[str, ...], environ: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
) -> list[str | SlurmError]:
    """The answers of ``commands``, all started at once, within ``seconds``."""
    processes = [_started(command, environ, stderr) for command in commands]
    last = time.monotonic() + seconds
    found: list[str | SlurmError] = []
    for command, process in zip(commands, processes, strict=True):
        if isinstance(process, SlurmError):
            found.append(process)
            continue
        try:
            found.append(answer(process, max(0.0, last - time.monotonic())))
        except TimeoutError:
            found.append(SlurmError(f"{' '.join(command)}: no answer in {seconds:g} s"))
        except SlurmError as error:
            found.append(error)
        finally:
            end(process)
    return found


def _started(
    command: tuple[str, ...], environ: Mapping[str, str] | None, stderr: int
) -> subprocess.Popen[bytes] | SlurmError:
    try:
        return ask(*command, environ=environ, stderr=stderr)
    except SlurmError as error:
        return error


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command if it still runs. Slurm may still do what the command has requested."""
    process.kill()
    process.communicate()
