"""Wishes for the nodes of a running job: how many there may be, and which must leave. Pure.

The leader sends its wishes with every order, an agent stores them (``promises``) and reports them with every status,
and a leader that takes over adopts the newest. So a wish outlives the leader that got the request, without a new round.
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
    """A node must leave, at a step boundary if its workers listen."""

    node: int
    name: str
    reason: str
    exclude: bool = False
    """The node is unfit: it leaves as soon as the job can continue without it, and a requeue avoids it too."""
    give_back: bool = False
    """The node is returned to Slurm."""
    by: float | None = None
    """When the node will be taken away, in seconds since the epoch; None if unknown."""
    apart: tuple[int, ...] = ()
    """The nodes that this node does not reach, if it leaves for that (``links``): it stays once it reaches them again.
    """
    slow: bool = False
    """The node is slower than the others (``slow``)."""

    @property
    def asked(self) -> bool:
        """Whether the node leaves on request: without a charge, and only when the job can continue without it; this run
        of the job avoids the node from then on. Else the node's own job ends, and it leaves anyway.
        """
        return self.exclude or self.give_back


@dataclass(frozen=True)
class Wishes:
    """``number`` counts the changes: when the wishes of two leaders differ, the higher number wins."""

    number: int = 0
    bounds: Bounds | None = None
    """Replace the bounds that the job was submitted with."""
    partings: tuple[Parting, ...] = ()
    given_back: tuple[int, ...] = ()
    """The job's own nodes that were returned to Slurm."""

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
