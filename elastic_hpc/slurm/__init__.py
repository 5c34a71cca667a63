"""The only package that runs Slurm's commands. Unknown is not empty: what cannot be asked raises SlurmError."""

from elastic_hpc.slurm.job import Job, cancel, job_state, show_job
from elastic_hpc.slurm.nodes import usable_nodes
from elastic_hpc.slurm.requeuing import complete, requeue
from elastic_hpc.slurm.settings import Site, site
from elastic_hpc.slurm.steps import start_step, wait_until_alone
from elastic_hpc.slurm.submit import resubmit, sbatch

__all__ = [
    "Job",
    "Site",
    "cancel",
    "complete",
    "job_state",
    "requeue",
    "resubmit",
    "sbatch",
    "show_job",
    "site",
    "start_step",
    "usable_nodes",
    "wait_until_alone",
]
