"""Runs sbatch, for a new job and for the batch script of a running job."""

from __future__ import annotations

import re
import select
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from elastic_hpc.environment import for_a_new_job
from elastic_hpc.errors import SlurmError, UsageError
from elastic_hpc.slurm import client

# Messages of failures that are not due to the user's input: sbatch has one exit code for all failures.
_UNREACHABLE = re.compile(
    "unable to contact|timed out|no answer in|connection (failure|refused)|configuration source|zero bytes|munge|"
    "authentication",
    re.IGNORECASE,
)


def sbatch(
    script: bytes,
    options: Sequence[str],
    environ: Mapping[str, str],
    on_submitted: Callable[[str], None],
    on_message: Callable[[str], None],
    exports: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> int:
    """Submit ``script`` from ``folder`` and return sbatch's exit code; with ``--wait``, the job's exit code.

    The job gets ``exports`` and, unless ``--export`` hides them, the variables of ``environ`` that are neither Slurm's
    nor ours. ``on_submitted`` is called at once with ``ID[;CLUSTER]``; ``on_message`` with the rest of sbatch's output.
    Raises UsageError if Slurm refuses the job, SlurmError if Slurm does not answer.
    """
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                ["sbatch", "--parsable", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**client.clean_environment(for_a_new_job(environ)), **(exports or {})},
                cwd=folder,
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
            if not select.select([process.stdout], [], [], client.SECONDS)[0]:
                process.kill()
                raise SlurmError(f"sbatch: no answer in {client.SECONDS} s; the job may be queued or not: squeue --me")
            job = process.stdout.readline().decode().strip()
            if job:
                on_submitted(job)
            try:
                process.wait()
            except KeyboardInterrupt:  # with --wait: the job continues
                process.kill()
                raise
        stderr.seek(0)
        messages = stderr.read().decode(errors="replace")
        if job or process.returncode == 0:  # --test-only succeeds without a job
            on_message(messages)
            return process.returncode
        reason = client.condensed(messages) or f"sbatch ended with exit code {process.returncode}"
        raise refusal(reason)


def refusal(reason: str) -> SlurmError | UsageError:
    """The error for sbatch's failure with ``reason``: SlurmError if Slurm did not answer, UsageError if it refused."""
    if _UNREACHABLE.search(reason):
        return SlurmError(f"sbatch: {reason}")
    return UsageError(f"Slurm refused the job: {reason}")


def resubmit(job: str, script: Path, environ: Mapping[str, str], exports: Mapping[str, str]) -> str:
    """Submit the batch script of ``job`` again, to start when ``job`` has ended, and return the new job's id.

    For a job that may not be requeued. The options are the directives of ``script``. ``exports`` are variables for the
    new job; an ``--export`` among the directives must not hide them. For a task of an array, submits only this task,
    with the same index. Raises SlurmError.
    """
    from elastic_hpc.slurm.job import show_job

    folder = show_job(job).folder
    options = [f"--dependency=afterany:{job}", *([f"--chdir={folder}"] if folder else [])]
    _, _, task = job.partition("_")
    if task:
        options.append(f"--array={task}")
    try:
        new = submit_script(script.read_bytes(), options, environ, exports=exports)
    except (OSError, UsageError) as error:
        raise SlurmError(f"sbatch {script}: {error}") from None
    return new + (f"_{task}" if task else "")


def submit_script(
    script: bytes,
    options: Sequence[str],
    environ: Mapping[str, str],
    on_message: Callable[[str], None] = lambda _: None,
    exports: Mapping[str, str] | None = None,
    folder: str | None = None,
) -> str:
    """As ``sbatch``, but returns the id of the new job."""
    submitted: list[str] = []
    sbatch(script, options, environ, submitted.append, on_message, exports, folder)
    if not submitted:
        raise SlurmError("sbatch: no job ID")
    return submitted[0].partition(";")[0]
