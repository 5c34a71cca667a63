"""Which agents take part in a job: which ones its leader admits or refuses, and how agents leave. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from elastic_hpc.membership.inputs import Arrivals
from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.orders import Orders, Refusal
from elastic_hpc.membership.peers import Peer, Peers
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.rounds import Rounds


@dataclass
class Admission:
    """The conditions that all agents of a job must meet, and what happens to agents that do not, or no longer."""

    peers: Peers
    orders: Orders
    rounds: Rounds
    arrivals: Arrivals
    event: Callable[..., None]
    nproc: int
    """The number of workers on each node."""
    leader: Host | None
    """The host whose software all nodes must have; None if any software is accepted."""
    leaving: dict[int, float] = field(default_factory=dict)
    """The connections of the job's own nodes that the leader released and whose agents have not left, and since when.
    The job returns all of these nodes at once: without accounting, Slurm accepts no second change.
    """
    dropped: list[int] = field(default_factory=list)
    """Connections to close."""
    _refused_boots: set[str] = field(default_factory=set)
    """The processes that were refused as the second agent of a node."""

    def is_over(self, conn: int) -> bool:
        """Whether the agent of ``conn`` no longer takes part."""
        return self.orders.is_refused(conn) or conn in self.dropped

    def refuse(self, conn: int, status: Status, boot: str) -> Refusal | None:
        """Refuse the agent that has connected (process ``boot``) if it may not take part. Returns the refusal."""
        refusal = self._refusal(status, boot)
        if refusal:
            self.orders.refuse(conn, refusal)
            if refusal.is_new:
                self.event("unfit" if status.unfit else "refused", node=status.name, reason=refusal.reason)
            if refusal.final:
                self.peers.on_arrival(status.node)
        return refusal

    def join(self, peer: Peer, now: float) -> None:
        """``peer`` takes part from now on."""
        peer.joined, peer.arrived_at = True, now
        node = peer.status.node
        self.peers.on_arrival(node)
        self.event("join", node=peer.status.name, addr=peer.addr, joiner=not votes(node))
        self.arrivals.outdate()

    def lose(self, conn: int, reason: str, silent: float) -> bool:
        """As ``Leader.on_lost``. Returns whether there is something to decide."""
        self.orders.forget(conn)
        has_left = self.leaving.pop(conn, None) is not None
        peer = self.peers.remove(conn)
        if peer:
            self.dropped.append(conn)
        if not peer or self.rounds.are_over or not peer.joined:
            return has_left
        why = self.peers.why_leaving(peer.status)
        self._take_out(peer.status, why or reason, silent, event="left" if why else "lost")
        return True

    def give_up(self, peer: Peer, status: Status, now: float) -> bool:
        """The processes of a node cannot be killed: a node that took part stays out. Returns whether there is something
        to decide. The node's agent, which may be the leader's own, leaves when the job ends.
        """
        self.peers.on_status(peer, status, now)
        took_part, peer.joined = peer.joined, False
        if took_part:
            self.peers.barred[status.name] = "its processes cannot be killed"
            self._take_out(status, status.unfit, 0.0, event="lost")
        return took_part

    def let_go(self, node: int, reason: str, now: float) -> tuple[Host, str]:
        """Have the agent of ``node`` leave: for the reason already known, else for ``reason``. Returns its host and the
        reason.
        """
        conn = self.peers.conns[node]
        peer = self.peers.remove(conn, let_go=True)
        assert peer
        reason = self.peers.why_leaving(peer.status) or reason
        self.orders.refuse(conn, Refusal(reason, let_go=True))
        if votes(node):
            self.leaving[conn] = now
        return peer.status.host, reason

    def _take_out(self, status: Status, reason: str, silent: float, *, event: str) -> None:
        self.event(event, node=status.name, reason=reason, round=self.rounds.round, silent=round(silent, 3))
        self.arrivals.outdate()
        self.rounds.on_lost(status.node, f"{status.name} lost: {reason}")

    def _refusal(self, status: Status, boot: str) -> Refusal | None:
        first = self.peers.by_node.get(status.node)
        if first and first.boot != boot:  # the first keeps its place while it is connected
            is_new = boot not in self._refused_boots
            self._refused_boots.add(boot)
            reason = f"{status.name} has an agent in this job already, which is connected"
            return Refusal(reason, final=False, is_new=is_new)
        reason = self._unmet(status)
        return Refusal(reason) if reason else None

    def _unmet(self, status: Status) -> str:
        if status.unfit:
            return f"{status.name} is not fit: {status.unfit}"
        if status.nproc != self.nproc:
            return (
                f"{status.name} would start {status.nproc} workers, the leader's node {self.nproc}: "
                "all nodes must start the same number (--nproc-per-node)"
            )
        joiner = not votes(status.node)
        if joiner and status.name in self.peers.barred:
            return f"{status.name} stays out: {self.peers.barred[status.name]}"
        if joiner and any(
            other.name == status.name and node != status.node for node, other in self.peers.joined.items()
        ):
            return f"{status.name} runs an agent of this job already"
        if self.leader and status.host.software != self.leader.software:
            return (
                f"{status.name} has {status.host.software or 'unknown versions'}, the leader's node {self.leader.name} "
                f"{self.leader.software}: all nodes must have the same; train in one environment that they share"
            )
        return ""
