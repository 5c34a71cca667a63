"""Which job a command is about: what a user types for JOB."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from elastic_hpc.config import load
from elastic_hpc.errors import UsageError
from elastic_hpc.registry import known
from elastic_hpc.rundir import RunDir


def add_job(parser: argparse.ArgumentParser, nargs: str | None = None, *, started: bool = True) -> None:
    """``args.job`` is its run directory, or the list of them. ``started``: it must be there already."""
    parser.add_argument(
        "job",
        metavar="JOB",
        nargs=nargs,
        type=started_run_dir if started else run_dir,
        help="the job's id, or its run directory, for example elastic-logs/4711",
    )


def started_run_dir(text: str) -> RunDir:
    """The run directory of a job that has started. Raises UsageError."""
    found = run_dir(text)
    if not found.path.is_dir():
        raise UsageError(f"job {text} has not started yet: {found.path} is not there; see: elastic-hpc status {text}")
    return found


def run_dir(text: str) -> RunDir:
    """The run directory of a job, which may not be there yet. Raises UsageError if there is no such job."""
    if text and (found := next((path for path in _candidates(text) if path.is_dir()), None)):
        return RunDir(found.absolute())
    remembered = [path for path in known() if path.name == text]
    if not remembered:
        raise UsageError(
            f"{text!r}: expected a job's id that was submitted from here, or its run directory, for example "
            "elastic-logs/4711; elastic-hpc status lists your jobs"
        )
    return RunDir(remembered[-1])


def _candidates(text: str) -> Iterator[Path]:
    yield Path(text)
    yield Path("elastic-logs", text)
    if log_dir := load(os.environ, Path.cwd()).options.get("log-dir"):
        yield Path(log_dir.value, text)
