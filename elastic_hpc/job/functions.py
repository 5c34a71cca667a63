"""A Python function in place of a training script. submitit pickles the function and runs it on every rank. What the
ranks return or raise is kept by round, so that what a lost world has left never counts as the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit.core import utils

from elastic_hpc.errors import ElasticError

MODULE = "submitit.core._submit"
"""The module that submitit's own executors run, with the folder of the pickle as its argument."""

CLUSTERS = ("elastic", "elastic-local")


def write(function: Callable[..., Any], args: Sequence[Any], folder: Path, run_dir: Path) -> None:
    """Pickle the call into ``folder``, the argument of the workers of the job in ``run_dir``."""
    utils.DelayedSubmission(function, *args).dump(utils.JobPaths(folder, run_dir.name).submitted_pickle)


def environ() -> dict[str, str]:
    """The environment of this process, for agents whose workers run a function."""
    return {**os.environ, "SUBMITIT_EXECUTOR": CLUSTERS[0]}


def runs_folder(folder: Path | str) -> Path:
    """The folder for an executor's run directories and the output of its batch scripts."""
    return Path(utils.JobPaths.get_first_id_independent_folder(folder), "elastic")


def results_folder(run_dir: Path, round: int) -> Path:
    return run_dir / "results" / str(round)


def result(path: Path) -> Any:
    """What a rank returned, from its file ``path``. Raises ElasticError if the rank left nothing, or an error."""
    try:
        outcome, value = utils.pickle_load(path)
    except OSError as error:
        raise ElasticError(f"rank {path.stem} has left no result: {path}: {error.strerror}") from None
    if outcome != "success":
        raise ElasticError(f"rank {path.stem} has failed:\n{value}")
    return value
