"""submitit's parameters as options of an elastic job. submitit and the table of sbatch's options define which exist."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from submitit.auto.auto import AutoExecutor
from submitit.slurm.slurm import SlurmExecutor

from elastic_hpc.errors import UsageError
from elastic_hpc.options.of_joiners import JOINERS
from elastic_hpc.options.sbatch import SBATCH
from elastic_hpc.options.table import ELASTIC
from elastic_hpc.options.torchrun import OPTIONS

Update = Callable[..., None]

_RENAMED = {
    "name": "job_name",
    "timeout_min": "time",
    "num_gpus": "gpus_per_node",
    "tasks_per_node": "nproc_per_node",
    "ntasks_per_node": "nproc_per_node",
    "signal_delay_s": "grace",
}
_REFUSED = {
    "stderr_to_stdout": "stdout and stderr of a rank are files of their own",
    "srun_args": "elastic_hpc writes its own srun line; use a template",
    "teardown": "the batch script may be lost with its node; let the function clean up",
    "log_dir": "the run directories are in the executor's folder",
}
_OPTIONS = frozenset(
    name.replace("-", "_") for name in (*ELASTIC, *SBATCH, *JOINERS, *(option.name for option in OPTIONS))
)
_KNOWN = _OPTIONS | SlurmExecutor._valid_parameters() | AutoExecutor._valid_parameters()


class _AsSlurm(SlurmExecutor):
    """Accepts the parameters of submitit's own Slurm executor, without Slurm, and starts nothing."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        self.parameters.update(kwargs)


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of AutoExecutor that begin with ``elastic_``, without the prefix, and the others. Raises NameError
    for a parameter that does not exist, as submitit does for its own executors.
    """
    ours = {key.removeprefix("elastic_"): value for key, value in given.items() if key.startswith("elastic_")}
    for name in ours:
        if name not in _KNOWN:
            from difflib import get_close_matches

            close = get_close_matches(name, _KNOWN, n=1)
            meant = f" Did you mean 'elastic_{close[0]}'?" if close else ""
            raise NameError(
                f"Unknown argument '{name}' for executor 'elastic' in parameter 'elastic_{name}'.{meant} "
                f"Valid arguments: {', '.join(sorted(_KNOWN))}"
            )
    return ours, {key: value for key, value in given.items() if not key.startswith("elastic_")}


def of_auto(auto: AutoExecutor, given: Mapping[str, Any], update: Update) -> dict[str, Any]:
    """Parameters of AutoExecutor for an elastic executor: ``elastic_`` overrides ``slurm_``, which overrides no prefix.
    ``update``: submitit's own function, which checks the parameters that submitit knows and translates them for Slurm.
    It does not get ``nodes``, which it requires to be a number, and options of sbatch that it does not know.
    """
    ours, others = split({key: value for key, value in given.items() if value is not None})
    beyond = {}
    for key in list(others):
        name = key.removeprefix("slurm_")
        if name == "nodes" or (name != key and name in SBATCH_ONLY):
            value = others.pop(key)
            if name != key or name not in beyond:
                beyond[name] = value
    slurm = copy.copy(auto)
    slurm.cluster, slurm._executor = "slurm", _AsSlurm()
    update(slurm, **others)
    return {**renamed(slurm._executor.parameters), **renamed(beyond), **renamed(ours)}


SBATCH_ONLY = frozenset(name.replace("-", "_") for name in SBATCH) - SlurmExecutor._valid_parameters()


def renamed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters under the names of options."""
    options = {_RENAMED.get(name, name): value for name, value in parameters.items()}
    if (gb := options.pop("mem_gb", None)) is not None:
        options["mem"] = f"{gb:.0f}G" if gb == int(gb) else f"{gb * 1024:.0f}M"
    elif isinstance(options.get("mem"), str):
        options["mem"] = options["mem"].removesuffix("B")
    return options


def options_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Renamed parameters as options by name. Raises UsageError for a parameter that an elastic job cannot have."""
    options = dict(parameters)
    for name, reason in _REFUSED.items():
        if options.pop(name, None):
            raise UsageError(f"{name}: {reason}; leave it out")
    if not options.pop("use_srun", True):
        raise UsageError("use_srun=False: srun starts the agents; leave it out")
    cores, workers = options.get("cpus_per_task"), str(options.get("nproc_per_node") or 1)
    if isinstance(cores, int) and workers.isdecimal():  # Slurm sees one task on a node, the agent
        options["cpus_per_task"] = cores * int(workers)
    forced = options.pop("additional_parameters", None) or {}
    if not isinstance(forced, Mapping):
        raise UsageError(f"additional_parameters={forced!r}: expected a dict, for example {{'mail-type': 'END'}}")
    known = {name.replace("-", "_"): value for name, value in forced.items() if name.replace("-", "_") in _OPTIONS}
    newer = {name: value for name, value in forced.items() if name.replace("-", "_") not in _OPTIONS}
    return {**options, **known, **({"sbatch": newer} if newer else {})}
