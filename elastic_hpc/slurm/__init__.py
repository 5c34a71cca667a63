"""The only package that runs Slurm's commands. Unknown is not empty: what cannot be asked raises SlurmError."""

from elastic_hpc.slurm.directives import joiner_script
from elastic_hpc.slurm.job import cancel, epoch, job_state, queue, show_job, states, warn, warning_reason
from elastic_hpc.slurm.joining import Joiner, change_time_limit, joiners, submit_joiner
from elastic_hpc.slurm.nodes import expand, usable_nodes
from elastic_hpc.slurm.requeuing import complete, requeue
from elastic_hpc.slurm.settings import Facts, Site, facts, site
from elastic_hpc.slurm.states import LIVES, WAITS, Queued, SlurmJob
from elastic_hpc.slurm.steps import start_agent, start_step, step_environment, wait_until_alone
from elastic_hpc.slurm.submit import resubmit, sbatch

__all__ = [
    "LIVES",
    "WAITS",
    "Facts",
    "Joiner",
    "Queued",
    "Site",
    "SlurmJob",
    "cancel",
    "change_time_limit",
    "complete",
    "epoch",
    "expand",
    "facts",
    "job_state",
    "joiner_script",
    "joiners",
    "queue",
    "requeue",
    "resubmit",
    "sbatch",
    "show_job",
    "site",
    "start_agent",
    "start_step",
    "states",
    "step_environment",
    "submit_joiner",
    "usable_nodes",
    "wait_until_alone",
    "warn",
    "warning_reason",
]
