"""The only module that runs Slurm's commands. Unknown is not empty: what cannot be asked raises SlurmError."""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from elastic_hpc.errors import SlurmError, UsageError

_SECONDS = 60  # for an answer of slurmctld; its own clients give up after 10 to 30
# Needed to find and enter the cluster. Every other SLURM_* and SBATCH_* variable overrides the script's directives,
# or is a leftover of the job that we are called from.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})
# sbatch has one exit code for everything. These are not the user's input.
_UNREACHABLE = re.compile(
    "unable to contact|timed out|connection (failure|refused)|configuration source|zero bytes|munge|authentication",
    re.IGNORECASE,
)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without the variables that change what sbatch does."""
    return {k: v for k, v in environ.items() if k in _KEPT or not k.startswith(("SBATCH_", "SLURM_"))}


def sbatch(
    script: bytes,
    options: Sequence[str],
    environ: Mapping[str, str],
    on_submitted: Callable[[str], None],
    on_message: Callable[[str], None],
) -> int:
    """Submit ``script`` and return sbatch's exit code, with ``--wait`` the job's.

    ``on_submitted`` is called at once with ``ID[;CLUSTER]``; ``on_message`` with what sbatch says besides.
    Raises UsageError if Slurm refuses the job, SlurmError if it could not be asked.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                ["sbatch", "--parsable", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=clean_environment(environ),
            )
        except OSError as error:
            raise SlurmError(
                f"sbatch: {error.strerror}; is this a login node of the cluster, and is Slurm's module loaded?"
            ) from None

        with process:
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(script)
                process.stdin.close()
            except BrokenPipeError:
                pass  # sbatch refused its options before it read the script; its message follows
            if not select.select([process.stdout], [], [], _SECONDS)[0]:
                process.kill()
                raise SlurmError(f"sbatch: no answer in {_SECONDS} s; the job may be queued or not: squeue --me")
            job = process.stdout.readline().decode().strip()
            if job:
                on_submitted(job)
            try:
                process.wait()
            except KeyboardInterrupt:  # the user waits no longer; the job goes on
                process.kill()
                raise
        said.seek(0)
        messages = said.read().decode(errors="replace")
        if job or process.returncode == 0:  # --test-only succeeds without a job
            on_message(messages)
            return process.returncode
        reason = condensed(messages) or f"sbatch ended with exit code {process.returncode}"
        if _UNREACHABLE.search(reason):
            raise SlurmError(f"sbatch: {reason}")
        raise UsageError(f"Slurm refused the job: {reason}")


def condensed(messages: str) -> str:
    """What a Slurm command said on stderr, on one line without its prefixes."""
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip() for line in messages.splitlines()]
    lines = [line for line in lines if not line.startswith("Try ")]  # its own help
    return "; ".join(dict.fromkeys(filter(None, lines)))


def requeue(job: str, *, start_after: timedelta, exclude: Sequence[str] = ()) -> str | None:
    """Send ``job``, for an array task ``JOB_TASK``, back to the queue, to start after ``start_after``.

    ``exclude`` adds to the nodes that the job excludes already. ``start_after`` must outlast the completion of the
    job, else Slurm sets a start time of its own, two minutes away. Raises SlurmError if Slurm does not requeue; returns
    what it did not accept after that, None if all went well.
    """
    _scontrol("requeue", job)
    try:
        changes = [f"StartTime=now+{start_after.total_seconds():.0f}"]
        if exclude:
            changes.append(f"ExcNodeList={','.join([*_excluded(job), *exclude])}")
        _scontrol("update", f"JobId={job}", *changes)
    except SlurmError as error:
        return str(error)
    return None


def _excluded(job: str) -> list[str]:
    """The nodes that the job excludes so far, in Slurm's notation: an update replaces the list."""
    match = re.search(r"\bExcNodeList=(\S+)", _scontrol("show", "job", job, "--oneliner"))
    return [match[1]] if match and match[1] != "(null)" else []


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    try:
        environ = clean_environment(os.environ)
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, env=environ)
    except OSError as error:
        raise SlurmError(f"{' '.join(command)}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in {_SECONDS} s") from None
    if done.returncode:
        reason = condensed(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command)}: {reason}")
    return done.stdout.decode(errors="replace")
