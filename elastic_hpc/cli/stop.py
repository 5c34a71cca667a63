"""``elastic-hpc stop``, also called ``cancel``: ends jobs without a requeue."""

from __future__ import annotations

import argparse

from elastic_hpc.cli import entry
from elastic_hpc.errors import ElasticError
from elastic_hpc.job.handle import Job
from elastic_hpc.job.lookup import find

HELP = "end running or pending jobs; they are not requeued"
EPILOG = """examples:
  elastic-hpc stop 4711
  elastic-hpc cancel 4711 4712 elastic-logs/4713     cancel is the same command
  elastic-hpc stop 4711 --after-checkpoint           the workers save first

An array ends with all its tasks; 4711_3 is one task. It is no error if a job has already ended. If a job cannot be
stopped, elastic-hpc says why and continues with the others; the exit code is then 1, or 2 for a JOB that does not
exist."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # parsed in run: a JOB that does not exist must not keep the other jobs running
    parser.add_argument(
        "jobs", metavar="JOB", nargs="+", help="job ID, or run directory, for example elastic-logs/4711"
    )
    parser.add_argument(
        "--after-checkpoint", action="store_true", help="let the workers save first, for at most --grace"
    )


def run(args: argparse.Namespace) -> int:
    """The exit code: the highest exit code of all jobs."""
    code = 0
    for given in dict.fromkeys(args.jobs):
        try:
            print(_stop(Job(find(given)), after_checkpoint=args.after_checkpoint), flush=True)
        except ElasticError as error:
            entry.tell("elastic-hpc", str(error))
            code = max(code, error.exit_code)
        except PermissionError as error:  # the job of another user
            entry.tell("elastic-hpc", f"{error.filename}: {error.strerror}")
            code = max(code, 1)
    return code


def _stop(job: Job, *, after_checkpoint: bool) -> str:
    """What was done. A job that has already ended is no failure: the user wants it to end."""
    done = job.stop(after_checkpoint=after_checkpoint)
    if done == "over":
        status = job.status()
        return f"job {job.id} has ended, {status.state}" + (f": {status.reason}" if status.reason else "")
    if done == "cancelled":
        return f"job {job.id} is cancelled"
    return f"job {job.id}: stop requested" + ("; the workers save first" if after_checkpoint else "")
