"""Which nodes of a round do not reach each other, and which of them the job continues without. Pure.

Agents and leader may be connected while the workers of two nodes are not. So after a failure that may be the network's
fault, the leader has all members of the round try to reach each other. The job continues without the fewest nodes, so
that no such pair is left. The nodes left out stay connected and vote, and are tried again at growing intervals: a node
that reaches the others is readmitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from elastic_hpc.membership.growth import Backoff
from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.nodes import BATCH_HOST, numbers, spans, votes
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.policy import LinksView
from elastic_hpc.membership.sizing import Sizing
from elastic_hpc.membership.wishes import Parting

ANSWER_TIMEOUT = 15.0
"""Seconds for which the leader waits for the answers of the nodes. A node that does not answer proves nothing."""

_EXACT = 12
"""For at most this many pairs, the nodes found are certainly the fewest."""

_AT_MOST = 3
"""A node that was left out this many times stays out for this run, as each time costs a hang and two restarts."""

_NAMED = 4
"""A sentence names at most this many pairs."""

Pair = tuple[int, int]
"""Two nodes that do not reach each other, the lower number first."""


def partners(node: int, nodes: Collection[int]) -> list[int]:
    """The other ``nodes``, in the order in which ``node`` tries to reach them. As in a tournament, each node has one
    partner at a time: no node is dialled by many at once.
    """
    field: list[int | None] = [*sorted(nodes)]
    if len(field) % 2:
        field.append(None)
    turns, me = len(field) - 1, field.index(node)
    order = []
    for turn in range(turns):
        if me == turns:
            partner = turn * (turns + 1) // 2 % turns
        else:
            partner = (turn - me) % turns
            partner = turns if partner == me else partner
        order.append(field[partner])
    return [other for other in order if other is not None]


def fewest(pairs: Collection[Pair], leader: int) -> tuple[int, ...]:
    """The fewest nodes that include one node of each of ``pairs``; for many pairs, perhaps a few nodes more. If there
    is a choice, joiners are chosen before nodes that vote, the highest number first, then the batch host, and the
    ``leader`` last.
    """

    def worth(node: int) -> tuple[bool, bool, bool, int]:
        return node == leader, node == BATCH_HOST, votes(node), -node

    if len(pairs) <= _EXACT:
        found = min(_covers(sorted(pairs)), key=lambda cover: (len(cover), sorted(map(worth, cover), reverse=True)))
        return tuple(sorted(found))
    chosen, left = [], list(pairs)
    while left:
        counts = Counter(node for pair in left for node in pair)
        chosen.append(min(counts, key=lambda node: (-counts[node], worth(node))))
        left = [pair for pair in left if chosen[-1] not in pair]
    return tuple(sorted(chosen))


def _covers(pairs: Sequence[Pair]) -> Iterator[frozenset[int]]:
    if not pairs:
        yield frozenset()
    for node in pairs[0] if pairs else ():
        for rest in _covers([pair for pair in pairs if node not in pair]):
            yield rest | {node}


def sentence_of(pairs: Sequence[Pair], names: Mapping[int, str]) -> str:
    """``n2 and n3 do not reach each other``."""
    named = [f"{names.get(one, one)} and {names.get(other, other)}" for one, other in pairs[:_NAMED]]
    more = f" (and {len(pairs) - _NAMED} more pairs)" if len(pairs) > _NAMED else ""
    return f"{', '.join(named)} do not reach each other{more}"


@dataclass(frozen=True)
class Probe:
    """Nodes that try to reach each other."""

    number: int
    among: tuple[int, ...]
    since: float
    again: str = ""
    """The name of the node that is tried again; empty after a failure, when all members of the round are tried."""

    def pairs(self, joined: Mapping[int, Status]) -> tuple[Pair, ...]:
        """The pairs of connected nodes in which one has not reached the other."""
        found = set[Pair]()
        for node in self.among:
            status = joined.get(node)
            if status and status.probed == self.number:
                with suppress(ValueError):
                    others = joined.keys() & set(self.among) & set(numbers(status.unreached)) - {node}
                    found |= {(min(node, other), max(node, other)) for other in others}
        return tuple(sorted(found))

    def lacks(self, joined: Mapping[int, Status]) -> bool:
        """Whether a connected node has not answered."""
        return any(node in joined and joined[node].probed != self.number for node in self.among)


NO_PROBE = Probe(0, (), float("inf"))


class Links:
    """The links between the nodes, as one leader knows them. Times are on its clock."""

    def __init__(self, peers: Peers, sizing: Sizing, event: Callable[..., None], node: int) -> None:
        """``node``: the leader's."""
        self._peers, self._sizing, self._event, self._node = peers, sizing, event, node
        self.probe = NO_PROBE
        """The running probe."""
        self._numbers = 0
        self._round = 0
        """The round whose members were tried last."""
        self._apart, self._parts = "", False
        """What the last probe found, and whether the job therefore continues without some nodes."""
        self._patience: dict[str, Backoff] = {}
        """By name of the nodes that were left out: when to try them again."""
        self._left = Counter[str]()
        """How often each node was left out, by name."""

    @property
    def among(self) -> str:
        return spans(self.probe.among)

    def begin(self, round: int, members: Collection[int], now: float) -> None:
        """``round`` has failed: its ``members`` must try to reach each other."""
        self._round, self._apart, self._parts = round, "", False
        self._try(tuple(sorted(members)), now)

    def view(self, round: int, now: float) -> LinksView:
        if self._round != round:
            return LinksView(probed=False, probing=0.0, apart="", parts=False)
        probing = self.probe.number and not self.probe.again
        left = max(0.001, self.probe.since + ANSWER_TIMEOUT - now) if probing else 0.0
        return LinksView(probed=True, probing=left, apart=self._apart, parts=self._parts)

    def look(
        self, round: int, joined: Mapping[int, Status], live: Callable[[], Collection[int]], now: float, *, calm: bool
    ) -> bool:
        """Act upon the answers, if all are there or it is too late for more. ``live()``: nodes that do not have to
        leave. ``calm``: the round trains, so that nodes may be tried again. Returns whether the job continues without
        some nodes.
        """
        probe = self.probe
        if probe.number and (not probe.lacks(joined) or now - probe.since >= ANSWER_TIMEOUT):
            self.probe = NO_PROBE
            if probe.again:
                self._readmit(probe, joined, now)
            elif pairs := probe.pairs(joined):
                self._part(round, pairs, len(probe.among), set(live()), now)
                return self._parts
        elif calm and not probe.number:
            self._try_again(joined, now)
        return False

    def _part(self, round: int, pairs: tuple[Pair, ...], members: int, live: set[int], now: float) -> None:
        names = {node: peer.status.name for node, peer in self._peers.by_node.items()}
        self._apart = sentence_of(pairs, names)
        shown = [[names.get(node, str(node)) for node in pair] for pair in pairs[:100]]
        self._event("apart", round=round, pairs=shown, reason=self._apart)
        chosen = fewest(pairs, self._node)
        if 2 * len(chosen) > members:
            return
        self._parts = True
        for node in chosen:
            own = [pair for pair in pairs if node in pair]
            others = tuple(sum(pair) - node for pair in own)
            name, host = names[node], self._peers.by_node[node].status.host
            parting = Parting(node, name, sentence_of(own, names), exclude=True, apart=others)
            self._patience.setdefault(name, Backoff()).failed(now)
            self._left[name] += 1
            self._sizing.leave(parting, live, host, settled=False)
            self._parts = bool(self._sizing.policy.fit(live - {node})) and self._parts
            live.discard(node)

    def _try(self, among: tuple[int, ...], now: float, again: str = "") -> None:
        self._numbers += 1
        self.probe = Probe(self._numbers, among, now, again)

    def _try_again(self, joined: Mapping[int, Status], now: float) -> None:
        left = {parting.node: parting for parting in self._sizing.wishes.partings if parting.apart}
        for parting in left.values():
            if parting.node not in joined:
                continue
            others = tuple(node for node in parting.apart if node in joined and node not in left)
            if not others:
                self._sizing.stay(parting.name)
                continue
            if self._left[parting.name] >= _AT_MOST:
                continue
            patience = self._patience.get(parting.name)
            if patience is None:  # an earlier leader left the node out
                patience = self._patience[parting.name] = Backoff()
                patience.failed(now)
            if now >= patience.at:
                self._try((parting.node, *others), now, parting.name)
                return

    def _readmit(self, probe: Probe, joined: Mapping[int, Status], now: float) -> None:
        """Readmit the node of ``probe`` if it and all its partners have answered that they reach each other."""
        if probe.pairs(joined) or any(node in joined and joined[node].probed != probe.number for node in probe.among):
            self._patience[probe.again].failed(now)
        else:
            self._sizing.stay(probe.again)
