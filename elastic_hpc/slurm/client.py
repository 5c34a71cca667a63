"""Runs Slurm's commands and reads what they say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from typing import IO

from elastic_hpc.errors import SlurmError

SECONDS = 60  # for an answer of slurmctld; its own clients give up after 10 to 30
# Every variable of these families changes what a command of Slurm does or what a program finds, or is a leftover of the
# job that we are called from. What sbatch's own say is in the script already (sbatch_environment). Ours mark what an
# agent has started, which a job must outlive, or belong to the job that we are called from.
_SLURM = ("SLURM", "_SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SPANK_", "PMI")
_OURS = "ELASTIC_HPC_"
# Needed to find and enter the cluster, and our configuration.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "ELASTIC_HPC_CONFIG"})

# What a user likes to see in a table, or to be asked. Not a part of clean_environment: jobs may have it.
_FILTERS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_", "SACCT_", "SSTAT_", "SPRIO_")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for what has no part in the job that this process may be part of, as a job that it submits."""
    return {k: v for k, v in environ.items() if k in _KEPT or not k.startswith((*_SLURM, _OURS))}


def condensed(messages: str) -> str:
    """What a Slurm command said on stderr, on one line without its prefixes."""
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip() for line in messages.splitlines()]
    lines = [line for line in lines if not line.startswith("Try ")]  # its own help
    return "; ".join(dict.fromkeys(filter(None, lines)))


def records(shown: str) -> list[dict[str, str]]:
    """What ``scontrol show`` with ``--oneliner`` said, for names and values without spaces."""
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines()]


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
    """Start a client of Slurm, in ``environ`` or what is ours of it. The requeue of a job sends SIGTERM to all its
    processes, also to those that ask for it: they inherit that it is blocked.
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
    """What ``process`` says on stdout. Raises SlurmError if it fails; if late, ends it, raises TimeoutError."""
    try:
        said, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise TimeoutError from None
    if process.returncode:
        assert isinstance(process.args, tuple)
        reason = condensed(complaint.decode(errors="replace")) or f"exit code {process.returncode}"
        raise SlurmError(f"{' '.join(process.args)}: {reason}")
    return said.decode(errors="replace")


def end(process: subprocess.Popen[bytes]) -> None:
    """Let go of a client that is late, if it is: what it asked for may still be done."""
    process.kill()
    process.communicate()
