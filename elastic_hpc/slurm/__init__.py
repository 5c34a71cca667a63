"""The only folder that runs Slurm's commands; other folders use the functions that this module names. Unknown is not
empty: a query that Slurm does not answer raises SlurmError.

Start with ``job``: what Slurm says about jobs and nodes. ``client`` runs the commands. ``states`` (pure) has the states
of jobs. ``nodes``: which nodes Slurm takes out of service.

* ``submit``, ``requeuing``, ``steps``: submit a job, send it back to the queue, start another job step.
* ``estimate``: when Slurm would start a job.
* ``joining``, ``directives`` (pure): joiners, and which lines of the batch script apply to them.
* ``others``: the whole queue and all nodes, for a job that gives way.
* ``settings``: the site's settings. ``env``: what an agent reads from Slurm's variables.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_hpc.slurm.directives import joiner_script
    from elastic_hpc.slurm.estimate import estimates
    from elastic_hpc.slurm.job import (
        cancel,
        comment,
        epoch,
        expand,
        job_state,
        mine,
        queue,
        recorded_end,
        show_job,
        usable_nodes,
        warn,
        warning_reason,
        write_comment,
    )
    from elastic_hpc.slurm.joining import Joiner, change_time_limit, joiners, submit_joiner
    from elastic_hpc.slurm.nodes import Maintenance, maintenance, out_of_service
    from elastic_hpc.slurm.requeuing import change_nodes, complete, give_back, keeps_preemption, release, requeue
    from elastic_hpc.slurm.settings import Facts, Site, facts, lets_shrink, notices_within, site
    from elastic_hpc.slurm.states import LIVES, WAITS, Estimate, Queued, SlurmJob
    from elastic_hpc.slurm.steps import (
        agent_steps,
        enter,
        nodes_of,
        start_agent,
        start_step,
        step_environment,
        unreached,
        wait_until_alone,
    )
    from elastic_hpc.slurm.submit import resubmit, sbatch, submit_script

__all__ = [
    "LIVES", "WAITS", "Estimate", "Facts", "Joiner", "Maintenance", "Queued", "Site", "SlurmJob", "agent_steps",
    "cancel", "change_nodes", "change_time_limit", "comment", "complete", "enter", "epoch", "estimates", "expand",
    "facts", "give_back", "job_state", "joiner_script", "joiners", "keeps_preemption", "lets_shrink", "maintenance",
    "mine", "nodes_of", "notices_within", "out_of_service", "queue", "recorded_end", "release", "requeue", "resubmit",
    "sbatch", "show_job", "site", "start_agent", "start_step", "step_environment", "submit_joiner", "submit_script",
    "unreached", "usable_nodes", "wait_until_alone", "warn", "warning_reason", "write_comment",
]  # fmt: skip

_NAMES = {
    "directives": "joiner_script",
    "estimate": "estimates",
    "job": "cancel comment epoch expand job_state mine "
    "queue recorded_end show_job usable_nodes warn warning_reason write_comment",
    "joining": "Joiner change_time_limit joiners submit_joiner",
    "nodes": "Maintenance maintenance out_of_service",
    "requeuing": "change_nodes complete give_back keeps_preemption release requeue",
    "settings": "Facts Site facts lets_shrink notices_within site",
    "states": "LIVES WAITS Estimate Queued SlurmJob",
    "steps": "agent_steps enter nodes_of start_agent start_step step_environment unreached wait_until_alone",
    "submit": "resubmit sbatch submit_script",
}  # fmt: skip
"""The names in ``__all__`` by module. A module is imported when first needed: a submission needs few modules."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}


def load() -> None:
    """Import all modules now: a long-lived process may need a name when the file system no longer answers."""
    for name in _MODULE_OF:
        __getattr__(name)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value
