"""Which agents may take part in a job, and which its leader refuses. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.roster import Host


@dataclass(frozen=True)
class Refusal:
    """Why an agent may not take part."""

    reason: str
    final: bool = True
    """The agent has to leave; else it may connect again later."""
    is_new: bool = True
    """The same process has not been refused before."""
    let_go: bool = False
    """The agent has taken part, and is not needed any more: that is no failure."""


class Admission:
    """The conditions that all agents of a job have to meet."""

    def __init__(self, nproc: int, leader: Host | None) -> None:
        """``nproc``: the number of workers on each node. ``leader``: the host whose software all nodes must have; None
        if any will do.
        """
        self._nproc, self.leader = nproc, leader
        self._refused_boots: set[str] = set()
        """The processes that were refused as the second agent of a node."""

    def refusal(self, status: Status, boot: str, peers: Peers) -> Refusal | None:
        """Why the agent that has connected, the process ``boot``, may not take part; None if it may."""
        first = peers.by_node.get(status.node)
        if first and first.boot != boot:  # the first keeps its place while it is connected
            is_new = boot not in self._refused_boots
            self._refused_boots.add(boot)
            reason = f"{status.name} has an agent in this job already, which is in contact"
            return Refusal(reason, final=False, is_new=is_new)
        reason = self._unmet(status, peers)
        return Refusal(reason) if reason else None

    def _unmet(self, status: Status, peers: Peers) -> str:
        if status.unfit:
            return f"{status.name} is not fit: {status.unfit}"
        if status.nproc != self._nproc:
            return (
                f"{status.name} would start {status.nproc} workers, the leader's node {self._nproc}: "
                "all nodes must start the same number (--nproc-per-node)"
            )
        joiner = not votes(status.node)
        if joiner and status.name in peers.barred:
            return f"{status.name} stays out: {peers.barred[status.name]}"
        if joiner and any(other.name == status.name and node != status.node for node, other in peers.joined.items()):
            return f"{status.name} runs an agent of this job already"
        if self.leader and status.host.software != self.leader.software:
            return (
                f"{status.name} has {status.host.software or 'unknown versions'}, the leader's node {self.leader.name} "
                f"{self.leader.software}: all nodes must have the same; train in one environment that they share"
            )
        return ""
