"""The jobs that wait or run, and the nodes of the cluster, for a job that gives way to others."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from elastic_hpc.errors import SlurmError
from elastic_hpc.membership.yielding import NodeEntry, NodeKind, QueueEntry
from elastic_hpc.slurm import client
from elastic_hpc.slurm.joining import is_joiner
from elastic_hpc.slurm.states import WAITS

_JOB = ("JobArrayID", "ArrayJobID", "State", "UserName", "QOS", "Partition", "PriorityLong", "tres-alloc", "NodeList",
        "ReqNodes", "Feature", "tres-per-node", "Reservation", "Reason", "Name")  # fmt: skip
# tres-alloc: for a waiting job, what it requests. Its number of nodes there is the least, in %D it may be the most.
_NODE = "%N;%P;%t;%f;%G;%c"
_FREE = re.compile(r"(idle|plnd|planned)[~#%]?")
"""States of a node that no job uses, also of a node without power, such as a cloud node until a job needs it."""


def all_jobs() -> tuple[QueueEntry, ...]:
    """All jobs that the user may see, including jobs that have just ended; the waiting tasks of an array are one entry.
    Raises SlurmError.
    """
    form = ":;,".join(_JOB)  # each field at full length, and a semicolon after each but the last
    answer = client.run("squeue", "--noheader", "--all", "--states=all", f"--Format={form}:")
    return tuple(_job(_fields(line, len(_JOB))) for line in answer.splitlines())


def all_nodes() -> tuple[NodeEntry, ...]:
    """Raises SlurmError also if the site shows no nodes to its users (PrivateData=nodes)."""
    answer = client.run("sinfo", "--noheader", "--all", "--Node", f"--format={_NODE}")
    partitions = defaultdict(set)
    found = {}
    for line in answer.splitlines():  # one for each partition of a node
        name, partition, *rest = _fields(line, _NODE.count(";") + 1)
        partitions[name].add(partition.removesuffix("*"))
        found[name] = rest
    if not found:
        raise SlurmError("sinfo: Slurm shows no node")
    return tuple(_node(name, frozenset(partitions[name]), *rest) for name, rest in found.items())


def _node(name: str, partitions: frozenset[str], state: str, features: str, gres: str, cpus: str) -> NodeEntry:
    """``gpu:a100:4(S:0-1)`` offers four of ``gpu`` and of ``gpu:a100``."""
    offers = Counter({word: 1 for word in features.split(",") if word})
    for word in filter(None, re.sub(r"\([^)]*\)", "", gres).split(",")):
        kind, amount = _resource(word)
        for what in {kind, kind.partition(":")[0]}:
            offers[what] += amount
    return NodeEntry(name, bool(_FREE.fullmatch(state)), NodeKind(partitions, frozenset(offers.items()), int(cpus)))


def _job(fields: list[str]) -> QueueEntry:
    id, array, state, user, qos, partition, priority, tres, nodes, required, *wanted, reason, name = fields
    features, gres, reservation = wanted
    demands = {word: 1 for word in features.split("&") if word}
    if reservation:
        demands[f"reservation {reservation}"] = 1  # no node offers a reservation: this job's nodes are not in it
    for word in filter(None, gres.split(",")):
        kind, amount = _resource(re.sub(r"^gres[:/]", "", word))
        demands[kind] = amount
    asked = dict(item.partition("=")[::2] for item in tres.split(","))
    return QueueEntry(
        id=id,
        array=array,
        waits=state in WAITS,
        user=user,
        qos=qos,
        partitions=frozenset(partition.split(",")),
        priority=int(priority),
        least=int(asked.get("node", 1)),
        cpus=int(asked.get("cpu", 1)),
        nodes=nodes,
        required=required,
        demands=frozenset(demands.items()),
        reason=reason,
        is_joiner=is_joiner(name),
    )


def _resource(word: str) -> tuple[str, int]:
    """The kind of a generic resource, ``gpu`` or ``gpu:a100``, and how many."""
    kind, _, amount = word.replace("=", ":").rpartition(":")
    return (kind, int(amount)) if kind and amount.isdecimal() else (word, 1)


def _fields(line: str, count: int) -> list[str]:
    """The fields of ``line``, the last of which may contain anything."""
    fields = line.split(";", count - 1)
    if len(fields) != count:
        raise SlurmError(f"expected {count} fields, not {line!r}")
    return ["" if field in {"(null)", "N/A"} else field for field in fields]
