"""The argument JOB of the commands, and errors about jobs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from elastic_hpc.errors import ElasticError, UsageError, argument
from elastic_hpc.job.look import Jobs, Look, may_be_recent
from elastic_hpc.job.lookup import expand, find, select
from elastic_hpc.record.rundir import RunDir


def add_job(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """``args.job`` becomes the run directory of the job, which may not exist yet; with ``nargs``, a list of these."""
    parser.add_argument(
        "job",
        metavar="JOB",
        nargs=nargs,
        type=argument(lambda text: RunDir(find(text))),
        help="job ID, or run directory, for example elastic-logs/4711",
    )


def single(command: str, rundir: RunDir) -> RunDir:
    """``rundir``, for a ``command`` that is about one job. Raises UsageError for an array."""
    if (tasks := expand(rundir.path)) != [rundir.path]:
        shown = f"{tasks[0].name} to {tasks[-1].name}" if len(tasks) > 1 else tasks[0].name
        raise UsageError(
            f"job {rundir.path.name} is an array; expected one of its tasks: elastic-hpc {command} {tasks[0].name}; "
            f"{len(tasks)} have started: {shown}"
        )
    return rundir


def looks_of(jobs: Jobs, given: Sequence[RunDir], query_interval: float = 0.0) -> list[Look]:
    """One more look by ``jobs``, at the ``given`` jobs or, if none are given, at all jobs that are recent by now.
    ``query_interval``: as for ``Jobs.look``. Active jobs come first.
    """
    jobs.observe([rundir for rundir in select(given) if given or may_be_recent(rundir)])
    looks = [look for look in jobs.look(query_interval) if given or look.is_recent()]
    return sorted(looks, key=lambda look: look.place)


def nothing_to_show(look: Look) -> ElasticError:
    """The error that the job has done nothing yet: why, and what to do."""
    view = look.view
    return ElasticError(
        "\n  ".join((f"job {view.id} has nothing to show; it is {view.summary}", *view.advice, *view.output))
    )
