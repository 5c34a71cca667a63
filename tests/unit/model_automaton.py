"""The nodes of the model checker as automata: equal states are recognized and stored compactly, and the real code
runs once for each pair of a state and an input.
"""

from __future__ import annotations

import io
import math
import pickle
import zlib
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

from model_node import Site, policy

from elastic_hpc.membership.election import Base
from elastic_hpc.membership.hangs import Rhythm
from elastic_hpc.membership.messages import Failure, Order, Plan, Redirect, Status
from elastic_hpc.membership.policy import Decision, Policy
from elastic_hpc.membership.roster import Host, Roster, RosterChange
from elastic_hpc.membership.wishes import Bounds, Parting, Wishes

_IGNORED = {
    *("_promises", "_keep"),
    *("_events", "by_node", "_hosts", "_node", "_link", "policy", "_host", "_latest", "out", "_own_leader"),
    *("_links", "hangs", "last_led", "_last_contact", "_waiting", "_waiting_recorded", "_reason", "addr"),
    *("admission", "arrivals", "links", "mandate", "orders", "requests", "rounds", "sizing", "stores"),
}
"""Fields that influence no decision here, follow from other fields, or duplicate parts of the leader."""

_WORDS = {"_predecessor_lost", "_last_loss", "abdicated"}
"""Texts for which it matters only whether they are empty."""

_REASONS = {"lost", "refused", "leaving"}
"""Dictionaries of reasons by node or connection, of which only the keys matter."""


class Values:
    """Immutable values, such as messages. Equal values have the same number."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._by_identity: dict[int, int] = {}

    def number(self, value: Any) -> int:
        known = self._by_identity.get(id(value))
        if known is None:
            if isinstance(value, (Roster, RosterChange)):
                key = (type(value), *(tuple(item) if name == "hosts" else item for name, item in _fields(value)))
            else:
                key = (type(value), replace(value, reason="") if isinstance(value, Order) else value)
            known = self._numbers.setdefault(key, len(self.all))
            if known == len(self.all):
                self.all.append(value)
                self._by_identity[id(value)] = known
        return known

    def reduce(self, value: Any) -> tuple[Any, tuple[int]]:
        return _value, (self.number(value),)


def _fields(value: Any) -> list[tuple[str, Any]]:
    return sorted((name, item) for name, item in vars(value).items() if name != "line")


VALUES = Values()

_VALUE_TYPES = (
    *(Status, Order, Redirect, Roster, RosterChange, Base, Plan, Failure, Host, Policy, Decision),
    *(Wishes, Bounds, Parting, Rhythm),
)


def _value(number: int) -> Any:
    return VALUES.all[number]


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[dict[type, Any]] = dict.fromkeys(_VALUE_TYPES, VALUES.reduce)  # type: ignore[misc]


def packed(thing: Any) -> bytes:
    """A compressed copy of ``thing``."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(thing)
    return zlib.compress(buffer.getvalue(), 1)


def unpacked(copy: bytes) -> Any:
    return pickle.loads(zlib.decompress(copy))


_names: dict[type, tuple[str, ...]] = {}


def frozen(thing: Any, clock: float) -> Any:
    """A hashable value that is equal for equal states."""
    kind = type(thing)
    if thing is None or kind is int or kind is str or kind is bool or kind is bytes:
        return thing
    if kind is float:
        return thing if math.isinf(thing) else round(thing - clock, 3)
    if kind in _VALUE_TYPES:
        return VALUES.number(thing)
    if kind is tuple or kind is list:
        return tuple([frozen(item, clock) for item in thing])
    if kind is set or kind is frozenset:
        return tuple(sorted(thing))
    entries: tuple[Any, ...] = ()
    if isinstance(thing, dict):
        entries = tuple(sorted((key, frozen(value, clock)) for key, value in thing.items()))
        if kind is dict:
            return entries
    if isinstance(thing, Enum):
        return thing.name
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(sorted(name for name in vars(thing) if name not in _IGNORED))
    fields = vars(thing)
    values = []
    for name in names:
        value = fields[name]
        if name in _WORDS:
            values.append(bool(value))
        elif name in _REASONS and isinstance(value, dict):
            values.append(tuple(sorted(value)))
        else:
            values.append(frozen(value, clock))
    return (kind.__name__, entries, *values)


@dataclass(frozen=True)
class Effect:
    """The effect of an input on a node."""

    node: int
    up: tuple[int, ...]
    down: tuple[tuple[int, tuple[int, ...]], ...]
    closed: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Look:
    """The facts about a node's state that the checker needs."""

    linked: bool
    leads: bool
    has_led: bool
    has_news: bool
    must_act: bool
    may_lead: bool
    is_new: bool
    runs: bool
    world: tuple[int, int] | None
    gone: bool
    """Whether the node was given back to Slurm."""
    agents: int
    """Number of agents that have run on this node."""


def _may_lead(site: Site) -> bool:
    """See ``network.finding``."""
    roster = site.promises.roster
    return site.promises.votes and roster is not None and site.index in roster.successors


class Nodes:
    """All states of nodes and all messages found so far, by number, and the effects of inputs on the states."""

    def __init__(self, least: int, most: int) -> None:
        self.policy = policy(least, most)
        self.packed: list[bytes] = []
        self.looks: list[Look] = []
        self._numbers: dict[int, int] = {}
        """Numbers by hash. Even among millions of states, a collision is less likely than a hardware fault."""
        self._effects: dict[tuple[Any, ...], Effect] = {}

    def add(self, site: Site) -> int:
        key = hash((site.linked, frozen(site, site.clock)))
        number = self._numbers.setdefault(key, len(self.packed))
        if number == len(self.packed):
            self.packed.append(packed(site))
            leader = site.leader
            self.looks.append(
                Look(
                    linked=site.linked,
                    leads=leader is not None,
                    has_led=leader is not None and leader.has_led,
                    has_news=leader is not None and leader.has_news,
                    must_act=site.must_act,
                    may_lead=_may_lead(site),
                    is_new=site.promises.roster is None and site.promises.votes,
                    runs=site.own.state == "running" and site.round > 0,
                    world=site.world,
                    gone=site.gone,
                    agents=site.agents,
                )
            )
        return number

    def after(self, node: int, name: str, *arguments: Any) -> Effect:
        """``name``: a method of ``Site``. The last argument may be a number that stands for a message."""
        key = (node, name, *arguments)
        effect = self._effects.get(key)
        if effect is None:
            site = unpacked(self.packed[node])
            if name in {"hear", "hears"}:
                arguments = (*arguments[:-1], VALUES.all[arguments[-1]])
            getattr(site, name)(*arguments)
            out = site.settle()
            down = tuple((conn, tuple(map(VALUES.number, said))) for conn, said in out.down)
            up = tuple(map(VALUES.number, out.up))
            effect = Effect(self.add(site), up, down, tuple(out.closed), out.ended)
            self._effects[key] = effect
        return effect
