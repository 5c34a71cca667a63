"""Elastic PyTorch jobs on Slurm: start with MIN nodes, use up to MAX, survive the loss of nodes.

The public names are those in ``__all__`` of this package, for submitting jobs from Python, those in ``__all__`` of
``elastic_hpc.training``, for training scripts, and ``LiveStrategy`` of ``elastic_hpc.training.lightning``. All other
modules are private: they change without notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_hpc import training as training
    from elastic_hpc.errors import ElasticError, SlurmError, UsageError
    from elastic_hpc.job.handle import Job, JobFailed, JobStatus, submit
    from elastic_hpc.job.launch import LaunchConfig, LaunchFailed, elastic_launch
    from elastic_hpc.job.script import render
    from elastic_hpc.job.spec import JobSpec

__version__ = "0.1.0"

__all__ = [
    "ElasticError",
    "Job",
    "JobFailed",
    "JobSpec",
    "JobStatus",
    "LaunchConfig",
    "LaunchFailed",
    "SlurmError",
    "UsageError",
    "elastic_launch",
    "render",
    "submit",
]

_HOMES = {
    **dict.fromkeys(("ElasticError", "SlurmError", "UsageError"), "errors"),
    **dict.fromkeys(("Job", "JobFailed", "JobStatus", "submit"), "job.handle"),
    **dict.fromkeys(("LaunchConfig", "LaunchFailed", "elastic_launch"), "job.launch"),
    "JobSpec": "job.spec",
    "render": "job.script",
}

if not TYPE_CHECKING:  # type checkers see the imports above

    def __getattr__(name):  # noqa: ANN001, ANN202
        """Import a name when it is first used: every agent and every command imports this package."""
        if name == "training":
            return import_module(f"{__name__}.training")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "training", *(name for name in globals() if name.startswith("__"))])
