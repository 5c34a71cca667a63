"""Which job a command is about: what a user types for JOB."""

from __future__ import annotations

import argparse

from elastic_hpc.errors import ElasticError, UsageError, argument
from elastic_hpc.jobs import Jobs, Look
from elastic_hpc.lookup import expand, find
from elastic_hpc.rundir import RunDir


def add_job(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """``args.job`` is its run directory, which may not be there yet, or the list of them."""
    parser.add_argument(
        "job",
        metavar="JOB",
        nargs=nargs,
        type=argument(lambda text: RunDir(find(text))),
        help="the job's id, or its run directory, for example elastic-logs/4711",
    )


def one(command: str, rundir: RunDir) -> RunDir:
    """The same, for a ``command`` that is about one job. Raises UsageError for an array."""
    if (tasks := expand(rundir.path)) != [rundir.path]:
        shown = f"{tasks[0].name} to {tasks[-1].name}" if len(tasks) > 1 else tasks[0].name
        raise UsageError(
            f"job {rundir.path.name} is an array, each of its tasks is a job: elastic-hpc {command} {tasks[0].name}; "
            f"{len(tasks)} have started: {shown}"
        )
    return rundir


def started(command: str, rundir: RunDir) -> Look:
    """How the one job is, for a ``command`` that shows what it has done. Raises ElasticError if it has done nothing."""
    (look,) = Jobs([one(command, rundir)]).look()
    if not rundir.path.is_dir():
        raise ElasticError(nothing_yet(look))
    return look


def nothing_yet(look: Look) -> str:
    """That a job without a run directory has done nothing, and what Slurm says of it."""
    view = look.view
    told = "\n".join((f"{view.state}: {view.note}" if view.note else view.state, *view.advice))
    return f"job {view.id} has " + ("not started" if view.over else "not started yet") + f"; it is {told}"
