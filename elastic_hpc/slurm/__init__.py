"""The only folder that runs Slurm's commands; other folders use the functions that this module names. Unknown is not
empty: what Slurm does not answer raises SlurmError.

Start with ``job``: what Slurm says about jobs and nodes. ``client`` runs the commands. ``states`` (pure) has the states
of jobs.

* ``submit``, ``requeuing``, ``steps``: a job is submitted, goes back to the queue, gets another job step.
* ``joining``, ``directives`` (pure): joiners, and which lines of the batch script hold for them.
* ``settings``: what the site has set. ``env``: what Slurm tells an agent by its environment.
"""

from elastic_hpc.slurm.directives import joiner_script
from elastic_hpc.slurm.job import (
    cancel,
    epoch,
    expand,
    job_state,
    queue,
    recorded_end,
    show_job,
    usable_nodes,
    warn,
    warning_reason,
)
from elastic_hpc.slurm.joining import Joiner, change_time_limit, joiners, submit_joiner
from elastic_hpc.slurm.requeuing import complete, keeps_preemption, release, requeue
from elastic_hpc.slurm.settings import Facts, Site, facts, notices_within, site
from elastic_hpc.slurm.states import LIVES, WAITS, Queued, SlurmJob
from elastic_hpc.slurm.steps import agent_steps, start_agent, start_step, step_environment, wait_until_alone
from elastic_hpc.slurm.submit import resubmit, sbatch, submit_script

__all__ = [
    "LIVES", "WAITS", "Facts", "Joiner", "Queued", "Site", "SlurmJob", "agent_steps", "cancel", "change_time_limit",
    "complete", "epoch", "expand", "facts", "job_state", "joiner_script", "joiners", "keeps_preemption",
    "notices_within", "queue", "recorded_end", "release", "requeue", "resubmit", "sbatch", "show_job", "site",
    "start_agent", "start_step", "step_environment", "submit_joiner", "submit_script", "usable_nodes",
    "wait_until_alone", "warn", "warning_reason",
]  # fmt: skip
