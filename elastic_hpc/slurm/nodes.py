"""Lists of nodes, and which nodes a job can get."""

from __future__ import annotations

from collections.abc import Collection

from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import show_job


def expand(nodes: str) -> list[str]:
    """The names that ``nodes`` stands for, in Slurm's notation."""
    return client.scontrol("show", "hostnames", nodes).split() if nodes else []


def usable_nodes(job: str) -> frozenset[str]:
    """Names of the nodes that Slurm could give to ``job``, now or when others have left them.

    They are in one of its partitions and neither down nor drained. Other demands of the job are not considered. Nodes
    that the job excludes are among them, because that may change.
    """
    partitions = set(show_job(job).partitions)
    return _usable(client.scontrol("show", "node", "--oneliner"), partitions)


def _usable(shown: str, partitions: Collection[str]) -> frozenset[str]:
    # Not from sinfo: 22.05 goes on listing a node as mixed* that was set DOWN under a job.
    gone = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "FUTURE", "UNKNOWN", "NOT_RESPONDING", "MAINT"}
    return frozenset(
        row["NodeName"]
        for row in client.records(shown)
        if not set(partitions).isdisjoint(row.get("Partitions", "").split(","))
        and gone.isdisjoint(word.rstrip("*~#!%$@^-") for word in row.get("State", "UNKNOWN").split("+"))
    )
