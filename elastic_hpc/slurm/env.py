"""A job step and one agent in it, as the variables of Slurm, or of ``elastic-srun --local``, describe them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_hpc.environment import AGAIN, FIRST_JOB, FIRST_RUN, JOIN, LOCAL_NODE, LOCAL_NODES, NODES, SPENT
from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.nodes import joiner, votes


@dataclass(frozen=True)
class AgentEnv:
    """One agent's place in the job step."""

    job: str
    """What ``scontrol`` calls this job; for an array task ``ARRAY_TASK``."""
    node: int
    """Index of this node in Slurm's order, or a joiner's number (``nodes.FIRST_JOINER``)."""
    name: str
    """Slurm's name of this node."""
    nodes: int
    """Number of nodes of the step."""
    run: int
    """How often the job has started before, for any reason."""
    cpus: int
    """Cores this agent's workers may use."""
    gpus: int | None
    """GPUs granted on this node; None if Slurm does not say."""
    submit_host: str | None
    local: bool
    run_id: str = ""
    """TORCHELASTIC_RUN_ID of the workers, unless the user chooses another: the same in all runs of the job."""
    late: bool = False
    """Whether this agent starts while the job already runs: on a joiner's node, or in place of an agent that died."""

    @property
    def joins(self) -> bool:
        """Whether a joiner has brought this node."""
        return not votes(self.node)


def job_name(environ: Mapping[str, str]) -> str:
    """What ``scontrol`` calls the job of this process. Raises KeyError outside a job."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def restart_count(environ: Mapping[str, str]) -> int:
    """How often Slurm has requeued this job. Slurm does not set the variable in the first run."""
    return int(environ.get("SLURM_RESTART_COUNT", 0))


def run_number(environ: Mapping[str, str]) -> int:
    """How often the job has started before, together with the jobs in whose place it continues (``slurm.resubmit``)."""
    return restart_count(environ) + int(environ.get(FIRST_RUN, 0))


def first_job(environ: Mapping[str, str]) -> str:
    """``job_name`` of the job that the user has submitted; the current job may continue in its place."""
    return environ.get(FIRST_JOB) or job_name(environ)


def spent(environ: Mapping[str, str]) -> tuple[int, int]:
    """The restarts and the requeues that were charged before the job was resumed."""
    restarts, _, requeues = environ.get(SPENT, "").partition(",")
    return int(restarts or 0), int(requeues or 0)


def read_agent_env(environ: Mapping[str, str]) -> AgentEnv:
    """Raises ElasticError if this process is no agent of a job step with one agent per node."""
    usable = len(os.sched_getaffinity(0))
    if LOCAL_NODE in environ:
        count = int(environ[LOCAL_NODES])
        node = int(environ[LOCAL_NODE])
        return AgentEnv("local", node, f"local{node}", count, 0, max(1, usable // count), None, None, local=True)
    try:
        job, node = job_name(environ), int(environ.get(AGAIN) or environ["SLURM_NODEID"])
        if JOIN in environ:
            node = joiner(environ["SLURM_JOB_ID"])
        name, count = environ["SLURMD_NODENAME"], int(environ["SLURM_STEP_NUM_NODES"])
        tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    except KeyError as missing:
        raise ElasticError(
            f"{missing.args[0]} is not set: an agent runs in a Slurm job step, from elastic-sbatch or elastic-srun;"
            " on this machine alone type: elastic-srun --standalone SCRIPT"
        ) from None
    host, names = os.uname().nodename.partition(".")[0], environ.get(NODES, "").split()
    if host in names:
        name, node = host, names.index(host)
    if tasks != count:
        raise ElasticError(
            f"{tasks} agents on {count} nodes: expected one per node, "
            "for example srun --ntasks-per-node=1 python -m elastic_hpc.agent ..."
        )
    granted = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE")
    gpus = environ.get("SLURM_GPUS_ON_NODE")
    return AgentEnv(
        job=job,
        node=node,
        name=name,
        nodes=count,
        run=run_number(environ),
        cpus=min(usable, int(granted)) if granted else usable,
        gpus=int(gpus) if gpus else None,
        submit_host=environ.get("SLURM_LAUNCH_NODE_IPADDR"),
        local=False,
        run_id=first_job(environ),
        late=JOIN in environ or AGAIN in environ,
    )
