"""What is wanted of a job's nodes while it runs: how many there may be, and which have to go. Pure.

The leader tells its agents with every order, an agent keeps what it was told (``promises``) and reports it with every
status, and a leader that takes over adopts the newest. So a wish outlives the leader that was asked, without a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastic_hpc.membership.nodes import numbers, spans


@dataclass(frozen=True)
class Bounds:
    """How many nodes a world may have."""

    min_nodes: int
    max_nodes: int
    sizes: tuple[int, ...]
    """The numbers of nodes that a world may have, ascending; empty for all from ``min_nodes`` to ``max_nodes``."""

    def capped(self, nodes: int) -> Bounds:
        """These bounds with at most ``nodes`` nodes, but never fewer than MIN."""
        sizes = tuple(size for size in self.sizes if size <= nodes) or self.sizes[:1]
        return Bounds(self.min_nodes, max(sizes) if sizes else max(self.min_nodes, min(nodes, self.max_nodes)), sizes)

    def __str__(self) -> str:
        whole = tuple(range(self.min_nodes, self.max_nodes + 1))
        if self.sizes and self.sizes != whole:
            return spans(self.sizes)
        return f"{self.min_nodes}:{self.max_nodes}"

    @property
    def body(self) -> dict[str, Any]:
        """For a message, or a file: ``of`` reads it."""
        return {**vars(self), "sizes": spans(self.sizes)}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Bounds:
        """Raises ValueError, KeyError or TypeError."""
        bounds = cls(body["min_nodes"], body["max_nodes"], numbers(body["sizes"]))
        if not 1 <= bounds.min_nodes <= bounds.max_nodes:
            raise ValueError(f"{bounds.min_nodes}:{bounds.max_nodes}: expected 1 <= MIN <= MAX")
        return bounds


def saved(state: Mapping[str, Any] | None) -> Bounds | None:
    """The bounds in ``state.json``; None without any, or if they are damaged."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        return Bounds.of((state or {})["bounds"])
    return None


@dataclass(frozen=True)
class Parting:
    """A node has to go, at a step boundary if its workers listen."""

    node: int
    name: str
    reason: str
    exclude: bool = False
    """The node is not fit: it goes as soon as the job can do without it, and a requeue avoids it too."""
    give_back: bool = False
    """The node is given back to Slurm."""
    by: float | None = None
    """When it will be taken away, in seconds since the epoch; None if nobody has said."""
    apart: tuple[int, ...] = ()
    """The nodes that this node does not reach, if it goes for that (``links``): it stays when it reaches them again."""
    slow: bool = False
    """The node is slower than the others (``slow``)."""

    @property
    def asked(self) -> bool:
        """Whether somebody wants the node to go, at no charge, and it may stay as long as the job needs it; this run of
        the job avoids it from then on. Else its job ends, and it goes anyway.
        """
        return self.exclude or self.give_back


@dataclass(frozen=True)
class Wishes:
    """``number`` counts the changes: of two leaders' wishes the higher number wins."""

    number: int = 0
    bounds: Bounds | None = None
    """Instead of those that the job was submitted with."""
    partings: tuple[Parting, ...] = ()
    given_back: tuple[int, ...] = ()
    """The job's own nodes that Slurm has back."""

    def changed(self, **changes: Any) -> Wishes:
        return replace(self, number=self.number + 1, **changes)

    @property
    def body(self) -> dict[str, Any]:
        """For a message: ``of`` reads it."""
        return {
            "number": self.number,
            "bounds": self.bounds and self.bounds.body,
            "partings": [asdict(parting) for parting in self.partings],
            "given_back": spans(self.given_back),
        }

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Wishes:
        """Raises ValueError, KeyError or TypeError."""
        return cls(
            int(body["number"]),
            Bounds.of(body["bounds"]) if body["bounds"] else None,
            tuple(Parting(**{**parting, "apart": tuple(parting.get("apart", ()))}) for parting in body["partings"]),
            numbers(body["given_back"]),
        )


NO_WISHES = Wishes()
