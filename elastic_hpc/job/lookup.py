"""Finds the run directory of a job that a user names, in a shell or in Python, and of all jobs. Reads files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from elastic_hpc.errors import UsageError
from elastic_hpc.job.config import load
from elastic_hpc.record.registry import itself, remembered, tasks, with_tasks
from elastic_hpc.record.rundir import RunDir

_FILES = ("spec.json", "secret", "verdict.json", "script.sbatch")
"""A folder in the working directory with the id of a job as its name is a run directory if it has such a file."""
_LOG_DIR = Path("elastic-logs")


def find(job: str) -> Path:
    """The absolute path of the run directory of ``job``, which may not exist yet. ``job``: an id, or a path if it has a
    ``/``.

    Raises UsageError if there is no such job, or several: of other folders or other clusters.
    """
    try:
        found = {os.path.realpath(path): itself(path.absolute()) for path in _candidates(job)}
    except OSError:  # the name is too long
        found = {}
    if not found:
        raise UsageError(
            f"{job!r}: expected the ID of a job that was submitted from here, or its run directory, for example "
            "elastic-logs/4711; elastic-hpc status lists your jobs"
        )
    if len(found) > 1:
        listed = "".join(f"\n  {path}" + ("" if path.is_dir() else " (not started)") for path in found.values())
        raise UsageError(f"{job} is the ID of {len(found)} jobs; give the run directory of the one you mean:{listed}")
    return next(iter(found.values()))


def expand(run_dir: Path) -> list[Path]:
    """``run_dir``; for an array, the run directories of its tasks that have started."""
    return tasks(run_dir) or [run_dir]


def select(run_dirs: Sequence[RunDir]) -> list[RunDir]:
    """``run_dirs``, with each array replaced by its tasks that have started. If empty, the run directories of all known
    jobs of this user: submitted lately, or in ./elastic-logs.
    """
    if run_dirs:
        return [RunDir(path) for rundir in run_dirs for path in expand(rundir.path)]
    here = [itself(path.absolute()) for path in _LOG_DIR.glob("*") if os.path.exists(path / "spec.json")]
    return [RunDir(path) for path in dict.fromkeys([*with_tasks(), *sorted(here, key=lambda p: (len(p.name), p.name))])]


def _candidates(job: str) -> Iterator[Path]:
    if "/" in job or job in {"", ".", ".."}:
        path = Path(job).absolute()
        if job and (_may_be_a_jobs(path) or path in _remembered(path.name)):
            yield path
        return
    name = job.partition(";")[0]  # sbatch --parsable prints ID;CLUSTER
    if any(os.path.exists(Path(name, file)) for file in _FILES):
        yield Path(name)
    folders = [_LOG_DIR]
    if log_dir := load(os.environ, Path.cwd()).options.get("log-dir"):
        folders.append(Path(log_dir.value))
    for folder in folders:
        if (folder / name).is_dir() or tasks(folder / name):
            yield folder / name
    yield from _remembered(name)


def _may_be_a_jobs(folder: Path) -> bool:
    """Whether ``folder`` is empty, or has a file of a run directory."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except PermissionError:  # a folder of another user
        return folder.is_dir()
    except OSError:
        return False
    return not names or not names.isdisjoint((*_FILES, "logs", "endpoint.json", "state.json"))


def _remembered(name: str) -> Iterator[Path]:
    """Run directories of submitted jobs called ``name`` that have started or may start: their log directories exist."""
    array = re.fullmatch(r"(\d+)_\d+", name)
    for path in remembered():
        if path.name == name or (array and path.name == array[1]):
            run_dir = path.with_name(name)
            if run_dir.is_dir() or run_dir.parent.is_dir():
                yield run_dir
