"""Which agent leads at the beginning. Exactly one does, even if ``--rdzv-endpoint`` matches several nodes."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_hpc.errors import ElasticError
from elastic_hpc.network import addresses
from elastic_hpc.options.values import Endpoint
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv


def leads_at_first(endpoint: Endpoint, env: AgentEnv, rundir: RunDir, environ: Mapping[str, str]) -> bool:
    """Whether this agent of a job step leads at the beginning. If ``endpoint`` names no host, the agent of the first
    node leads. Otherwise it is an agent of that host. The name or address may belong to several nodes; then the first
    agent that claims the lead in the run directory leads. If the directory cannot be written, the node with that name
    in Slurm leads, or the job's first node.
    """
    if env.late:
        return False
    if env.local or endpoint.head is None:
        return env.node == 0
    step = (environ.get("SLURM_JOB_ID", env.job), environ.get("SLURM_STEP_ID", ""), str(env.run))
    is_me = addresses.is_me(endpoint.head, env.name)
    try:
        return is_me and rundir.claim(f"first.{'.'.join(step)}", env.name)
    except ElasticError:
        return is_me and (env.node == 0 or endpoint.head == env.name)
