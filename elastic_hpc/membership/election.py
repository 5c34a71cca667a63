"""Who may lead: majorities over the members of the last rounds. Pure.

An agent obeys one leader at a time, and kills its workers before it obeys another leader; a world trains only while all
its members obey the same leader. So two worlds never train as long as any two groups of nodes that may continue have a
node in common. Each round changes the nodes that count. As in Raft's joint consensus, majorities of the old round and
of the new round must both agree, until so many nodes have acknowledged the new round that the others cannot decide.

As in Paxos, the number of a round is a ballot, and each node keeps what it has promised and accepted (``promises``). A
leader forms a round only when all nodes that it counts have received an order with the number of that round, and have
reported which roster they hold; the leader adopts a later roster than its own. A node acknowledges a roster only if it
has received no order with a higher number. So of two rounds that do not know of each other, at most one is ever
acknowledged by enough nodes, and a world starts only then. This holds for every node that keeps its promises. An agent
that is restarted on a node reads the promises of that node; where they are lost, the node, like a joiner, no longer has
a vote in this run.

No clock is part of this, and the clocks of two nodes need not agree. A leader may continue for a heartbeat timeout
without its agents, which may obey another leader by then; its orders reach no agent that obeys another leader. Clocks
only say when a node looks for another leader, and when a leader was frozen and must wait for the answers of its agents
before it decides.

Only nodes of the job's own allocation vote and lead. Joiners, which further jobs bring, train as members of a world
like any other, obey one leader at a time too, and leave when none of the job's own nodes leads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """The members of ``round`` that vote, and the node that formed it."""

    round: int
    leader: int
    members: tuple[int, ...]

    def agrees(self, nodes: Collection[int]) -> bool:
        """Whether ``nodes`` hold more than half of the members, or exactly half with the node that led."""
        agreeing, needed = 2 * len(set(nodes).intersection(self.members)), len(self.members)
        return agreeing > needed or (agreeing == needed and self.leader in nodes)


def has_quorum(bases: Iterable[Base], nodes: Collection[int]) -> bool:
    """Whether ``nodes`` may continue. Without a base, before the first round, no node need agree."""
    return all(base.agrees(nodes) for base in bases)


def extended(bases: tuple[Base, ...], new: Base) -> tuple[Base, ...]:
    """``bases`` and ``new``, the base of a round that was just formed. An older base with equal members is dropped."""
    return (*(b for b in bases if (b.leader, b.members) != (new.leader, new.members)), new)


def relevant(bases: tuple[Base, ...], held: Mapping[int, int]) -> tuple[Base, ...]:
    """``bases`` without the bases that can no longer decide, as too few of their members are unaware of a newer base.

    ``held``: the round of the newest base that each node is known to hold; a node that formed a round holds its base.
    """
    known = dict(held)
    for base in bases:
        known[base.leader] = max(base.round, known.get(base.leader, 0))
    kept = [b for b in bases[:-1] if b.agrees({n for n in (*b.members, b.leader) if known.get(n, 0) <= b.round})]
    return (*kept, *bases[-1:])


def order_of_succession(nodes: Iterable[int], *, lost: int | None, me: int | None) -> list[int]:
    """Nodes that ``me`` asks before it leads itself: the nodes before it in Slurm's order, the lost leader last. None
    stands for a node that cannot lead, and asks all nodes.
    """
    return sorted((node for node in nodes if me is None or node < me), key=lambda node: (node == lost, node))
