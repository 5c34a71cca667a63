"""Elastic PyTorch jobs on Slurm: start with MIN nodes, use up to MAX, survive the loss of nodes.

What is exported here is the Python way in, see docs/python.md; ``elastic_hpc.training`` is for training scripts.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_hpc.errors import ElasticError, SlurmError, UsageError
    from elastic_hpc.job import Job, JobFailed, JobStatus, submit
    from elastic_hpc.launch import LaunchConfig, LaunchFailed, elastic_launch
    from elastic_hpc.script import JobSpec, render

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
    **dict.fromkeys(("Job", "JobFailed", "JobStatus", "submit"), "job"),
    **dict.fromkeys(("LaunchConfig", "LaunchFailed", "elastic_launch"), "launch"),
    **dict.fromkeys(("JobSpec", "render"), "script"),
}


def __getattr__(name: str) -> object:
    """Import what is asked for, when it is: every agent and every command imports this package."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
