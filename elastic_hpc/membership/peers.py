"""The agents that a leader is in touch with, and the nodes that it has heard of. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from elastic_hpc.membership.growth import Needs
from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.nodes import fold, votes
from elastic_hpc.membership.roster import Host

_MOST_NAMES = 200
"""Characters that the names of missing nodes get in the record."""


def weighed(status: Status) -> tuple[object, ...]:
    """What of ``status`` decisions are made by; the rest is for the record."""
    world = (status.state, status.round, status.failure, status.drained, status.listens, status.step >= 0)
    return (*world, status.seen, status.roster, status.mark, status.unfit, status.leaving, status.host)


@dataclass
class Peer:
    """An agent, as far as its last status says."""

    status: Status
    addr: str
    last_heard: float
    since: float
    """When it came."""
    forgetful: bool = False
    """It was a member of a round that counts, and does not know of it: its agent was started anew. It has forgotten
    what it agreed to, so it agrees to nobody until it holds a roster again."""
    joined: bool = False
    """It has been seen without workers, or comes from the world that is taken over; others hold nobody up."""

    @property
    def agrees(self) -> bool:
        return self.joined and not (self.forgetful and self.status.roster < 0)


class Peers(dict[int, Peer]):
    """By connection. Times are the leader's, in seconds."""

    def __init__(self, known: Iterable[Host], heartbeat_timeout: float, now: float) -> None:
        super().__init__()
        self.by_node: dict[int, Peer] = {}
        self.conns: dict[int, int] = {}
        """By node; each has one connection at most."""
        self.seen: set[int] = set()
        """The job's own nodes that are not waited for any more: they have joined once, or were refused."""
        self.leaving: dict[int, str] = {}
        """Nodes that have to go, and why, as others have said."""
        self._timeout = heartbeat_timeout
        self._hosts = {host.node: host for host in known}
        self._looked = now

    def add(self, conn: int, peer: Peer) -> None:
        self[conn] = self.by_node[peer.status.node] = peer
        self.conns[peer.status.node] = conn

    def remove(self, conn: int) -> Peer | None:
        """The peer of ``conn``, if there is one."""
        peer = self.pop(conn, None)
        if peer:
            del self.by_node[peer.status.node], self.conns[peer.status.node]
        return peer

    def hear(self, peer: Peer, status: Status, now: float) -> None:
        peer.status, peer.last_heard = status, now
        self._hosts[status.node] = status.host

    def saw(self, node: int) -> None:
        if votes(node):
            self.seen.add(node)

    def why_leaving(self, status: Status) -> str:
        """Why this node has to go; empty if it has not."""
        return status.leaving or self.leaving.get(status.node, "")

    def refusal(self, status: Status, nproc: int, leader: Host | None) -> str:
        """Why this node may not take part; empty if it may. ``nproc``: the workers of each node. ``leader``: who
        has the software that all must have, if that matters.
        """
        if status.unfit:
            return f"{status.name} is not fit: {status.unfit}"
        if status.nproc != nproc:
            return (
                f"{status.name} would start {status.nproc} workers, the leader's node {nproc}: "
                "all nodes must start the same number (--nproc-per-node)"
            )
        if not votes(status.node) and status.name in {s.name for n, s in self.joined.items() if n != status.node}:
            return f"{status.name} runs an agent of this job already"
        if leader and status.host.software != leader.software:
            return (
                f"{status.name} has {status.host.software or 'unknown versions'}, the leader's node {leader.name} "
                f"{leader.software}: all nodes must have the same; train in one environment that they share"
            )
        return ""

    def not_joined(self, granted: Sequence[str]) -> str:
        """Those of the ``granted`` nodes, Slurm's names in its order, that were never here; empty for none."""
        text = fold([name for node, name in enumerate(granted) if node not in self.seen])
        return text if len(text) <= _MOST_NAMES else f"{text[:_MOST_NAMES].rpartition(',')[0]}, ..."

    def needs(self, wanted: int, *, over: bool) -> Needs:
        """What is missing to ``wanted`` nodes, 0 for nothing."""
        staying = sum(not self.why_leaving(peer.status) for peer in self.values())
        return Needs(
            nodes=max(0, wanted - staying),
            joiners=frozenset(node for node in self.by_node if not votes(node)),
            names=frozenset(peer.status.name for peer in self.values()),
            missing=tuple(self.missing) if wanted else (),
            over=over,
        )

    @property
    def joined(self) -> dict[int, Status]:
        """What those say who have, by node."""
        return {node: peer.status for node, peer in self.by_node.items() if peer.joined}

    @property
    def agreeing(self) -> set[int]:
        """Nodes whose word counts."""
        return {node for node, peer in self.by_node.items() if peer.agrees}

    def since(self, nodes: Collection[int]) -> float:
        """When the last one of ``nodes`` came."""
        return max((self.by_node[node].since for node in nodes), default=0.0)

    @property
    def lost_names(self) -> list[str]:
        """Slurm's names of the nodes that were here, and are not any more."""
        return [host.name for host in self.missing]

    def names(self, *, but: int) -> list[str]:
        """Slurm's names of the job's own nodes that are here, without ``but``."""
        return [peer.status.name for node, peer in sorted(self.by_node.items()) if node != but and votes(node)]

    @property
    def missing(self) -> list[Host]:
        """The job's own nodes that were here, and are not any more."""
        here = self.by_node
        return [host for node, host in sorted(self._hosts.items()) if node not in here and votes(node)]

    @property
    def next_silence(self) -> float:
        """When the first one will have been silent for too long, if nothing arrives."""
        return min((peer.last_heard for peer in self.values()), default=float("inf")) + self._timeout

    def silent(self, now: float) -> dict[int, float]:
        """Connections on which nothing was heard for too long, and for how long. To be called a few times per
        heartbeat: the time in which a leader that was itself frozen did not look is not held against the others.
        """
        stalled = now - self._looked - self._timeout / 4
        self._looked = now
        if stalled > 0:
            for peer in self.values():
                peer.last_heard = min(now, peer.last_heard + stalled)
        return {c: now - peer.last_heard for c, peer in self.items() if now - peer.last_heard > self._timeout}
