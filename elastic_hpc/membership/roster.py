"""What every agent holds so that it can take over, and how that is sent to a thousand. Pure."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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


class Hosts(Sequence[Host]):
    """Those of a roster, without their software. Every agent holds a thousand and as a rule asks for none, so they stay
    packed until one is asked for.
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
    """What every agent holds so that it can take over: who listens where, who decides (``election``), and
    what has been charged when ``round`` was formed.
    """

    round: int
    hosts: Sequence[Host]
    bases: tuple[Base, ...]
    restarts: int
    requeues: int
    members: tuple[int, ...] = ()
    """All nodes of ``round``; its base has those that vote."""
    mark: str = ""
    """Tells it from any other one, also of the same round, that another leader has made."""

    def change_from(self, before: Roster) -> RosterChange | None:
        """What makes this one of ``before``; None if nobody can hold that."""
        if not before.mark:
            return None
        known, now = Hosts.of(before.hosts).rows, Hosts.of(self.hosts).rows
        new = Hosts(rows={node: row for node, row in now.items() if known.get(node) != row})
        told = {name: getattr(self, name) for name in _TOLD_ANYHOW}
        return RosterChange(**told, since=before.mark, hosts=new, gone=tuple(sorted(known.keys() - now.keys())))

    @functools.cached_property
    def line(self) -> bytes:
        """It goes to everybody, and is encoded once."""
        return json_line({"roster": _body(self)})


_TOLD_ANYHOW = ("round", "bases", "restarts", "requeues", "members", "mark")


@dataclass(frozen=True)
class RosterChange:
    """A roster, for those who hold the one before: as a rule a few hosts of a thousand are other ones."""

    round: int
    bases: tuple[Base, ...]
    restarts: int
    requeues: int
    members: tuple[int, ...]
    mark: str
    since: str
    """The mark of the one before."""
    hosts: Sequence[Host]
    """Those that are new, or listen elsewhere."""
    gone: tuple[int, ...]

    def of(self, before: Roster) -> Roster:
        """The roster itself; ``before`` is the one with the mark ``since``."""
        hosts = Hosts.of(before.hosts).changed(self.gone, self.hosts)
        return Roster(hosts=hosts, **{name: getattr(self, name) for name in _TOLD_ANYHOW})

    @functools.cached_property
    def line(self) -> bytes:
        """It goes to many, and is encoded once."""
        return json_line({"change": {**_body(self), "since": self.since, "gone": spans(self.gone)}})


def _body(roster: Roster | RosterChange) -> dict[str, Any]:
    return {
        **{name: getattr(roster, name) for name in _TOLD_ANYHOW},
        "members": spans(roster.members),
        "bases": [(base.round, base.leader, spans(base.members)) for base in roster.bases],
        "hosts": Hosts.of(roster.hosts).packed(),
    }


def json_line(body: dict[str, Any]) -> bytes:
    """``body`` as every message goes over the network."""
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"
