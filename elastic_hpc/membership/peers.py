"""The agents that are connected to a leader, and the nodes that ever were. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from elastic_hpc.membership.growth import PREEMPTED, Needs
from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.nodes import fold, votes
from elastic_hpc.membership.policy import NodesView, Policy
from elastic_hpc.membership.roster import Host, distinct
from elastic_hpc.membership.wishes import NO_WISHES, Parting

_MOST_NAMES = 200
"""In the record, the names of absent nodes take at most this many characters."""


def deciding_fields(status: Status) -> tuple[object, ...]:
    """The fields of ``status`` that decisions depend on. The other fields are for the record: a change of these alone
    leads to no new decision.
    """
    workers = (status.state, status.round, status.failure, status.drained, status.listens, status.step >= 0)
    going_on = (status.live, status.preparing)
    held = (status.seen, status.roster, status.mark, status.oldest)
    return (*workers, *going_on, *held, status.probed, status.unreached, status.unfit, status.leaving, status.host)


@dataclass
class Peer:
    """An agent that is connected."""

    status: Status
    """The last status that was received."""
    addr: str
    last_contact: float
    arrived_at: float
    """When the agent connected; once it has joined, when it joined."""
    boot: str
    """A random text that identifies the process of the agent (``network.identity``)."""
    joined: bool = False
    """The agent has reported that it has no workers, or belongs to the world that is taken over. The leader waits for
    no agent that has not joined.
    """


class Peers(dict[int, Peer]):
    """By connection. Times are the leader's, in seconds."""

    def __init__(
        self,
        known: Iterable[Host],
        heartbeat_timeout: float,
        now: float,
        *,
        granted: int,
        granted_names: Sequence[str],
    ) -> None:
        """``known``: hosts that were connected to an earlier leader. ``granted``: the number of the job's own nodes.
        ``granted_names``: Slurm's names of these nodes, in Slurm's order; the caller may add the names later.
        """
        super().__init__()
        self.by_node: dict[int, Peer] = {}
        self.conns: dict[int, int] = {}
        """The connection of each node."""
        self.wishes = NO_WISHES
        """The size that the job should have, and the nodes that must leave."""
        self.let_go: set[int] = set()
        """The job's own nodes that this leader has released."""
        self._taken: set[int] = set()
        """See ``Needs.taken``: the joiners that are no longer connected."""
        self.barred: dict[str, str] = {}
        """By name: nodes that get no more workers, and why."""
        self.highest_round = 0
        """The highest round of all orders that an agent has received from any leader."""
        self._arrived: set[int] = set()
        """The job's own nodes that have joined once, or were refused. At the start the leader waits for the other
        nodes.
        """
        self._timeout = heartbeat_timeout
        self._hosts: dict[int, Host] = {}
        self.add_known(known)
        self._granted, self._granted_names = granted, granted_names
        self._started_at = self._last_below_min = self._checked_at = now
        self.fresh_order = 0
        """The number of the first order since this leader was frozen. An agent that has not received that order may
        obey another leader by now.
        """
        self._min_at: float | None = None
        """Since when enough nodes are live; None while too few are."""

    def add_known(self, hosts: Iterable[Host]) -> None:
        """``hosts`` were connected to an earlier leader."""
        self._hosts = {host.node: host for host in hosts} | self._hosts

    def add(self, conn: int, peer: Peer) -> None:
        self[conn] = self.by_node[peer.status.node] = peer
        self._taken.discard(peer.status.node)
        self.conns[peer.status.node] = conn

    def remove(self, conn: int, *, let_go: bool = False) -> Peer | None:
        """The peer of ``conn``, if there is one. ``let_go``: it was not lost."""
        peer = self.pop(conn, None)
        if peer:
            del self.by_node[peer.status.node], self.conns[peer.status.node]
            if self._is_taken(peer.status, lost=not let_go):
                self._taken.add(peer.status.node)
        return peer

    def on_status(self, peer: Peer, status: Status, now: float) -> None:
        """``peer`` has sent ``status``."""
        peer.status, peer.last_contact = status, now
        self._hosts[status.node] = status.host
        self.highest_round = max(self.highest_round, status.seen)

    def find(self, node: int | str) -> Host | None:
        """The host with this number or name that is or was connected; a connected host if two hosts share the name."""
        hosts = [peer.status.host for peer in self.values()] + list(self._hosts.values())
        return next((host for host in hosts if node in {host.node, host.name}), None)

    def on_arrival(self, node: int) -> None:
        """``node`` has joined or was refused."""
        if votes(node):
            self._arrived.add(node)

    def why_leaving(self, status: Status) -> str:
        """Why the node must leave; empty if it may stay. The job's own nodes stay even if barred, as they vote."""
        if (why := status.leaving or status.unfit) or not (self.wishes.partings or self.barred):
            return why
        barred = self.barred.get(status.name, "") if not votes(status.node) else ""
        parting = self._parting(status)
        return parting.reason if parting else barred

    def _parting(self, status: Status) -> Parting | None:
        for parting in self.wishes.partings:
            if parting.node == status.node or (parting.asked and parting.name == status.name):
                return parting
        return None

    @property
    def avoided(self) -> frozenset[str]:
        """Slurm's names of the nodes that the job avoids."""
        return frozenset(parting.name for parting in self.wishes.partings if parting.asked)

    def _is_taken(self, status: Status, *, lost: bool = False) -> bool:
        """See ``Needs.taken``. An agent that reports on its own that it leaves has received a signal."""
        if votes(status.node):
            return False
        parting = self._parting(status)
        return parting.reason == PREEMPTED if parting else lost or bool(status.leaving)

    @property
    def unfit(self) -> frozenset[str]:
        """The nodes of ``avoided`` that Slurm, the site or the user has declared unfit."""
        return frozenset(
            parting.name
            for parting in self.wishes.partings
            if parting.exclude and not parting.apart and not parting.slow
        )

    @property
    def absent(self) -> list[str]:
        """Slurm's names of the granted nodes that have never been connected; none while the names are not known."""
        return [name for node, name in enumerate(self._granted_names) if node not in self._arrived]

    @property
    def absent_names(self) -> str:
        """``absent`` in Slurm's notation."""
        text = fold(self.absent)
        return text if len(text) <= _MOST_NAMES else f"{text[:_MOST_NAMES].rpartition(',')[0]}, ..."

    def needs(self, wanted: int, *, over: bool, surplus: tuple[Host, ...] = ()) -> Needs:
        """What the job lacks to hold ``wanted`` nodes; 0 if it must get no more nodes. ``over``: the job ends.
        ``surplus``: nodes to return to Slurm.
        """
        staying = sum(
            not self.why_leaving(peer.status) and peer.status.name not in self.barred for peer in self.values()
        )
        missing = self.missing if wanted else []
        taken = frozenset(self._taken.union(node for node, peer in self.by_node.items() if self._is_taken(peer.status)))
        return Needs(
            nodes=max(0, wanted - staying),
            joiners=frozenset(node for node in self.by_node if not votes(node)),
            names=frozenset(peer.status.name for peer in self.values() if peer.status.node not in taken)
            | self.barred.keys()
            | self.avoided,
            missing=distinct(missing, self._hosts.values()) if missing else (),
            over=over,
            surplus=surplus,
            taken=taken,
        )

    @property
    def joined(self) -> dict[int, Status]:
        """The statuses of the nodes that have joined, by node."""
        return {node: peer.status for node, peer in self.by_node.items() if peer.joined}

    @property
    def agreeing(self) -> set[int]:
        """Nodes that agree to this leader, including those whose processes cannot be killed: their agents obey this
        leader, and start no workers.
        """
        peers, fresh = self.by_node.items(), self.fresh_order
        obeying = ((node, peer.status) for node, peer in peers if peer.joined or peer.status.unfit)
        return {node for node, status in obeying if status.votes and status.last_order >= fresh}

    @property
    def are_confirming(self) -> bool:
        """Whether this leader was frozen, and nodes have yet to acknowledge an order since."""
        fresh = self.fresh_order
        return bool(fresh) and any(status.votes and status.last_order < fresh for status in self.joined.values())

    def view(
        self,
        joined: dict[int, Status],
        idle: Collection[int],
        formed: Collection[int],
        policy: Policy,
        now: float,
        *,
        staying: frozenset[int],
    ) -> NodesView:
        """``joined``: the statuses of the nodes that have joined. ``idle``: nodes without workers, which are ready for
        the next round. ``formed``: the nodes of the running round. ``staying``: nodes that cannot be returned to Slurm.
        """
        leaving = {node for node, status in joined.items() if self.why_leaving(status)}
        asked = {node: parting for node in leaving if (parting := self._asked(joined[node]))}
        barred = (
            {node for node, status in joined.items() if status.name in self.barred} - leaving if self.barred else set()
        )
        live = joined.keys() - leaving - barred
        if policy.fit(live | asked.keys()):  # if too few would be left, as many as needed stay, bad nodes last
            for node in sorted(asked, key=lambda node: (asked[node].exclude, node)):
                if policy.fit(live):
                    break
                live, leaving = live | {node}, leaving - {node}
                del asked[node]
        ready = live.intersection(idle)
        newcomers = ready.difference(formed)
        if policy.fit(live):
            self._min_at = now if self._min_at is None else self._min_at
            self._last_below_min = now
        else:
            self._min_at = None
        return NodesView(
            ready=frozenset(ready),
            live=frozenset(live),
            leaving=frozenset(leaving),
            asked=frozenset(asked),
            returning=frozenset(node for node, parting in asked.items() if parting.give_back and votes(node)) - staying,
            staying=staying,
            barred=frozenset(barred),
            idle=frozenset(idle),
            preparing=frozenset(node for node in newcomers if joined[node].preparing),
            paused=frozenset(node for node in newcomers if joined[node].live),
            since_newcomer=now - max(self.by_node[node].arrived_at for node in newcomers) if newcomers else 0.0,
            listens=any(self.by_node[node].status.listens for node in formed if node in self.by_node),
            absent=max(0, self._granted - len(self._arrived)),
            since_start=now - self._started_at,
            since_min=now - self._min_at if self._min_at is not None else 0.0,
            below_min=now - self._last_below_min,
        )

    def _asked(self, status: Status) -> Parting | None:
        """The request that the node leaves, if nothing else makes it leave."""
        parting = None if status.leaving or status.unfit else self._parting(status)
        return parting if parting and parting.asked else None

    @property
    def missing(self) -> list[Host]:
        """The job's own nodes that were connected and no longer are, except those that were released."""
        gone = self.by_node.keys() | self.let_go | set(self.wishes.given_back)
        return [host for node, host in sorted(self._hosts.items()) if node not in gone and votes(node)]

    @property
    def lost_names(self) -> list[str]:
        """Slurm's names of the ``missing`` nodes, of nodes given up, and of nodes never connected."""
        return [
            *(host.name for host in self.missing),
            *(peer.status.name for peer in self.values() if peer.status.unfit),
            *self.absent,
        ]

    @property
    def all_names(self) -> list[str]:
        """Slurm's names of all connected nodes."""
        return sorted({peer.status.name for peer in self.values()})

    def names(self, *, without: int) -> list[str]:
        """Slurm's names of the job's own nodes that are connected, except the node ``without``."""
        return [peer.status.name for node, peer in sorted(self.by_node.items()) if node != without and votes(node)]

    @property
    def next_silence(self) -> float:
        """When the first agent will have been silent for too long, if no message arrives."""
        return min((peer.last_contact for peer in self.values()), default=float("inf")) + self._timeout

    def check_freeze(self, now: float, next_order: int) -> bool:
        """Whether this leader was frozen until now. Call this a few times per heartbeat timeout, and before any
        decision. The agents were not silent while the leader was frozen, but they may obey another leader by now: an
        agent agrees again when it has received ``next_order``, the number of the order that this leader sends next.
        """
        frozen = now - self._checked_at - self._timeout / 4
        self._checked_at = now
        if frozen > 0:
            self.fresh_order = next_order
            for peer in self.values():
                peer.last_contact = min(now, peer.last_contact + frozen)
        return frozen > 0

    def silent(self, now: float) -> dict[int, float]:
        """Connections on which nothing has arrived for too long, and for how many seconds."""
        return {c: now - peer.last_contact for c, peer in self.items() if now - peer.last_contact > self._timeout}
