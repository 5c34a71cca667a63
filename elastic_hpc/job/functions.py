"""A Python function in the place of a training script. submitit pickles it and runs it on every rank; what the ranks
return, or raise, is kept for each round, so that what a lost world left is never taken for the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit.core import utils

from elastic_hpc.errors import ElasticError

MODULE = "submitit.core._submit"
"""What submitit's own executors run, with the folder of the pickle as its argument."""

CLUSTERS = ("elastic", "elastic-local")


def write(function: Callable[..., Any], args: Sequence[Any], folder: Path, run_dir: Path) -> None:
    """Where the workers of the job in ``run_dir`` look for what they are to call, when ``folder`` is their argument."""
    utils.DelayedSubmission(function, *args).dump(utils.JobPaths(folder, run_dir.name).submitted_pickle)


def environ() -> dict[str, str]:
    """This process's environment, for agents whose workers run a function."""
    return {**os.environ, "SUBMITIT_EXECUTOR": CLUSTERS[0]}


def runs_folder(folder: Path | str) -> Path:
    """Where the run directories of an executor are, and the output of the batch scripts."""
    found: Path = utils.JobPaths.get_first_id_independent_folder(folder) / "elastic"
    return found


def results_folder(run_dir: Path, round: int) -> Path:
    return run_dir / "results" / str(round)


def result(path: Path) -> Any:
    """What a rank has returned, by its file. Raises ElasticError if it has left nothing, or an error."""
    try:
        outcome, value = utils.pickle_load(path)
    except OSError as error:
        raise ElasticError(f"rank {path.stem} has left no result: {path}: {error.strerror}") from None
    if outcome != "success":
        raise ElasticError(f"rank {path.stem} has failed:\n{value}")
    return value
