"""The environment variables that our processes pass on to each other, and Slurm's variables that workers do not see.
Pure: each function gets the environment as a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

LOCAL_NODE, LOCAL_NODES = "ELASTIC_HPC_LOCAL_NODE", "ELASTIC_HPC_LOCAL_NODES"

JOIN = "ELASTIC_HPC_JOIN"
"""The run directory of another job, for which this job brings a node."""

AGAIN = "ELASTIC_HPC_AGAIN"
"""The index in the job of the node whose agent is restarted."""

NODES = "ELASTIC_HPC_NODES"
"""The names of the job's nodes, in Slurm's order, for agents in an OCI container: up to Slurm 22.05 they have the batch
script's variables there, the same on all nodes, which do not say which node this is.
"""

CONTINUE, FIRST_RUN, FIRST_JOB = "ELASTIC_HPC_CONTINUE", "ELASTIC_HPC_FIRST_RUN", "ELASTIC_HPC_FIRST_JOB"
"""If Slurm does not allow a requeue, another job continues in place of the first job, and gets the first job's run
directory, number of starts, and id.
"""

SPENT = "ELASTIC_HPC_SPENT"
"""``RESTARTS,REQUEUES`` that were charged before the job was resumed: the budgets of this submission begin after them.
"""

AGENT_MARK = "ELASTIC_HPC_AGENT"
"""Marks an agent's workers, ``JOB.TOKEN``. The agent, after a round, and its guard, after the agent's end, kill all
processes with the mark that are part of that Slurm job, or of no job.
"""

RUN_DIR, GIVEN = "ELASTIC_HPC_RUN_DIR", "ELASTIC_HPC_GIVEN"
"""GIVEN: the variables that workers get from their agent, not from the user, ``NAME=VALUE;...``. An empty value stands
for every value.
"""

NOTIFY, NOTIFY_AFTER = "ELASTIC_HPC_NOTIFY", "ELASTIC_HPC_NOTIFY_AFTER"
"""Where to send notifications about the job (``agent.notify``), and after how many seconds without progress."""

OF_A_JOB = (LOCAL_NODE, LOCAL_NODES, JOIN, AGAIN, NODES, CONTINUE, FIRST_RUN, FIRST_JOB, SPENT, NOTIFY, NOTIFY_AFTER)
"""Variables for the agents of one job. A job that is started from within that job must not have them."""

LIVE = "ELASTIC_HPC_LIVE"
"""The agent's socket, to which workers connect that can be kept for the next round (``workers.lives``)."""

FENCE = "ELASTIC_HPC_FENCE"
"""The job, run and round of a worker, ``JOB.RUN.ROUND``, by which its checkpoints are fenced (``training.fences``)."""

_OF_A_ROUND = ("ELASTIC_HPC_ROUND", "ELASTIC_HPC_LOCAL_DIR", "ELASTIC_HPC_RANK0_ADDR", FENCE, "GLOO_SOCKET_IFNAME")
"""Variables that ``agent.rendezvous`` sets for each round."""

INSTEAD = {
    "SLURM_PROCID": "RANK",
    "SLURM_GTIDS": "RANK",
    "SLURM_TASK_PID": "os.getpid()",
    "SLURM_LOCALID": "LOCAL_RANK",
    "SLURM_NODEID": "GROUP_RANK",
    "SLURM_NTASKS": "WORLD_SIZE",
    "SLURM_NPROCS": "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS": "WORLD_SIZE",
    "SLURM_GPUS": "WORLD_SIZE",
    "SLURM_NTASKS_PER_NODE": "LOCAL_WORLD_SIZE",
    "SLURM_TASKS_PER_NODE": "LOCAL_WORLD_SIZE",
    "SLURM_STEP_TASKS_PER_NODE": "LOCAL_WORLD_SIZE",
    "SLURM_DISTRIBUTION": "GROUP_RANK and LOCAL_RANK",
    "SLURM_NNODES": "GROUP_WORLD_SIZE",
    "SLURM_JOB_NUM_NODES": "GROUP_WORLD_SIZE",
    "SLURM_STEP_NUM_NODES": "GROUP_WORLD_SIZE",
    "SLURM_JOB_CPUS_PER_NODE": "SLURM_CPUS_ON_NODE",
    "SLURM_NODELIST": "MASTER_ADDR",
    "SLURM_JOB_NODELIST": "MASTER_ADDR",
    "SLURM_STEP_NODELIST": "MASTER_ADDR",
    "SLURM_NODE_ALIASES": "MASTER_ADDR",
}
"""Slurm's variables that describe the agents and the granted nodes, and what workers use instead. A worker that saw
Slurm's variables would believe that it is a Slurm task, and count spares, joiners and dead nodes in its world.
"""

FAMILIES = {
    "SLURM_NTASKS_PER_": "LOCAL_WORLD_SIZE",
    "SLURM_CPU_BIND": "os.sched_getaffinity(0)",
    "SLURM_MEM_BIND": "os.sched_getaffinity(0)",
    **dict.fromkeys(
        ("PMI_", "PMI2_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL", "PALS_"),
        "RANK, WORLD_SIZE and LOCAL_RANK",
    ),
}
"""Like INSTEAD, by prefixes of names: variables that srun or mpirun sets for MPI libraries, and bindings."""


def instead_of(name: str) -> str | None:
    """What workers use instead of the variable ``name``; None if it is not hidden from them."""
    if name.startswith("PMIX_MCA_"):  # these are the user's settings
        return None
    name = re.sub(r"_(HET|PACK)_GROUP_\d+$", "", name)  # Slurm repeats some variables for each component
    by_family = (instead for family, instead in FAMILIES.items() if name.startswith(family))
    return INSTEAD.get(name) or next(by_family, None)


def is_hidden(name: str) -> bool:
    """Whether workers do not see the variable ``name``."""
    return instead_of(name) is not None


def prepare_worker_env(
    environ: MutableMapping[str, str],
    cpus: int,
    nproc: int,
    mark: str,
    *,
    run_dir: str = "",
    live: str = "",
    interface: str | None = None,
) -> None:
    """Change ``environ`` into the environment that the workers must inherit. Call this before there are threads: C
    libraries may read the environment at any time, for example to look up a name. ``live``: the path of the socket
    ``LIVE``, empty if the agent keeps no workers.
    """
    for name in [name for name in environ if name in OF_A_JOB or is_hidden(name)]:
        del environ[name]
    ours = {
        "OMP_NUM_THREADS": str(max(1, cpus // nproc)),
        "RES_OPTIONS": "timeout:1 attempts:1",  # a name server that is gone costs seconds, not minutes
        **({"NCCL_SOCKET_IFNAME": interface} if interface else {}),
        **dict.fromkeys(_OF_A_ROUND, ""),  # a new name would move the whole environment; a new value does not
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",  # ranks follow from the plan; no store traffic
    }
    given = {name: value for name, value in ours.items() if name not in environ}
    listed = ";".join(f"{name}={value}" for name, value in given.items())
    environ.update({**given, AGENT_MARK: mark, RUN_DIR: run_dir, GIVEN: listed, **({LIVE: live} if live else {})})


def forget_enclosing(environ: MutableMapping[str, str]) -> None:
    """Remove from ``environ`` the variables set by the agent of another job: a worker of that job may have started this
    process, or submitted its job. The mark stays: processes that a worker starts die with its agent.
    """
    given = (entry.partition("=")[::2] for entry in environ.get(GIVEN, "").split(";"))
    leftover = {name for name, value in given if value in {"", environ.get(name)}}
    for name in (*leftover, *_OF_A_ROUND[:-1], RUN_DIR, LIVE, GIVEN):
        environ.pop(name, None)


def for_a_new_job(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a job that is started or submitted here: without the variables that make this process part of its
    own job.
    """
    made = {name: value for name, value in environ.items() if name not in OF_A_JOB}
    forget_enclosing(made)
    return made


def is_of_another_job(environ: Mapping[str, str]) -> bool:
    """Whether a worker has submitted this process's Slurm job, so that the worker's variables mean nothing here."""
    agents, own = environ.get(AGENT_MARK, "").partition(".")[0], environ.get("SLURM_JOB_ID", "")
    return bool(agents and own) and agents != own
