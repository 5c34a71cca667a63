"""What every agent holds so that it can take over, and how it is sent to a thousand agents. Pure."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_hpc.membership.election import Base
from elastic_hpc.membership.nodes import spans


@dataclass(frozen=True)
class Host:
    """Where the agent of a node listens. ``node`` is its index in Slurm's order, or a joiner's number."""

    node: int
    name: str
    addresses: tuple[str, ...]
    port: int
    software: str = field(default="", compare=False)
    """The versions that all nodes must share, ``torch 2.13.0, Python 3.11``, as far as this is known."""


def distinct(hosts: Sequence[Host], among: Collection[Host] | None = None) -> tuple[Host, ...]:
    """``hosts`` without the addresses that several hosts have, such as the address of a container bridge, or of the
    link to a machine's own service processor: there a caller would reach any of these hosts, or itself. A host without
    any other address keeps all its addresses, like the agents on one machine. ``among``: the hosts to compare with,
    including ``hosts``; by default ``hosts`` alone.
    """
    count = Counter(address for host in (hosts if among is None else among) for address in set(host.addresses))
    own = [tuple(address for address in host.addresses if count[address] == 1) for host in hosts]
    return tuple(replace(host, addresses=found or host.addresses) for host, found in zip(hosts, own, strict=True))


class Hosts(Sequence[Host]):
    """The hosts of a roster, without their software. Every agent may hold a thousand hosts and usually needs none of
    them, so they stay packed until a host is looked up.
    """

    def __init__(self, packed: str = "", rows: dict[int, str] | None = None) -> None:
        """``packed`` or ``rows``, by node: ``NODE NAME PORT ADDRESS,...``, joined by semicolons."""
        self._packed, self._rows = packed, rows

    @classmethod
    def of(cls, hosts: Sequence[Host]) -> Hosts:
        if isinstance(hosts, cls):
            return hosts
        return cls(rows={h.node: f"{h.node} {h.name} {h.port} {','.join(h.addresses)}" for h in hosts})

    @property
    def rows(self) -> dict[int, str]:
        if self._rows is None:
            rows = self._packed.split(";") if self._packed else ()
            self._rows = {int(row.partition(" ")[0]): row for row in rows}
        return self._rows

    def packed(self) -> str:
        return self._packed or ";".join(self.rows[node] for node in sorted(self.rows))

    def at(self, node: int) -> Host:
        """Raises KeyError or ValueError."""
        _, name, port, addresses = self.rows[node].split(" ")
        return Host(node, name, tuple(addresses.split(",")), int(port))

    def changed(self, gone: Iterable[int], new: Sequence[Host]) -> Hosts:
        rows = {**self.rows, **Hosts.of(new).rows}
        for node in gone:
            rows.pop(node, None)
        return Hosts(rows=rows)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Host]:
        return map(self.at, sorted(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Roster:
    """What every agent holds so that it can take over: where each agent listens, whose agreement a leader needs
    (``election``), and what had been charged when ``round`` was formed.
    """

    round: int
    hosts: Sequence[Host]
    bases: tuple[Base, ...]
    restarts: int
    requeues: int
    members: tuple[int, ...] = ()
    """All nodes of ``round``; its base has only the nodes that vote."""
    mark: str = ""
    """Unique: another leader may form a roster of the same round."""
    barred: tuple[str, ...] = ()
    """Names of the nodes that get no more workers."""

    @property
    def successors(self) -> tuple[int, ...]:
        """The nodes that may lead next: every majority has one of them."""
        return self.bases[-1].members if self.bases else ()

    def change_from(self, before: Roster) -> RosterChange | None:
        """The difference to the roster ``before``; None if no agent can hold ``before``."""
        if not before.mark:
            return None
        rows_before, rows = Hosts.of(before.hosts).rows, Hosts.of(self.hosts).rows
        new = Hosts(rows={node: row for node, row in rows.items() if rows_before.get(node) != row})
        gone = tuple(sorted(rows_before.keys() - rows.keys()))
        return RosterChange(**_common(self), previous=before.mark, hosts=new, gone=gone)

    @functools.cached_property
    def line(self) -> bytes:
        """A roster is sent to every agent, and encoded once."""
        return json_line({"roster": _body(self)})


def _common(roster: Roster | RosterChange) -> dict[str, Any]:
    """The fields that a roster and a change have in common, except the hosts."""
    names = ("round", "bases", "restarts", "requeues", "members", "mark", "barred")
    return {name: getattr(roster, name) for name in names}


@dataclass(frozen=True)
class RosterChange:
    """A roster as its difference to the previous roster: usually a few hosts of a thousand have changed."""

    round: int
    bases: tuple[Base, ...]
    restarts: int
    requeues: int
    members: tuple[int, ...]
    mark: str
    barred: tuple[str, ...]
    previous: str
    """The mark of the previous roster."""
    hosts: Sequence[Host]
    """The hosts that are new, or listen elsewhere."""
    gone: tuple[int, ...]

    def of(self, before: Roster) -> Roster:
        """The new roster; ``before`` is the roster with the mark ``previous``."""
        hosts = Hosts.of(before.hosts).changed(self.gone, self.hosts)
        return Roster(hosts=hosts, **_common(self))

    @functools.cached_property
    def line(self) -> bytes:
        """A change is sent to many agents, and encoded once."""
        return json_line({"change": {**_body(self), "previous": self.previous, "gone": spans(self.gone)}})


def _body(roster: Roster | RosterChange) -> dict[str, Any]:
    return {
        **_common(roster),
        "members": spans(roster.members),
        "bases": [(base.round, base.leader, spans(base.members)) for base in roster.bases],
        "hosts": Hosts.of(roster.hosts).packed(),
    }


def json_line(body: dict[str, Any]) -> bytes:
    """``body`` as a line of JSON, the form of every message on the network."""
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"
