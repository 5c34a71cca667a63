"""Which nodes a job must leave before they fail or Slurm takes them away, why, and by when. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from elastic_hpc.membership.nodes import name_matcher

AHEAD = 300.0
"""Seconds before a maintenance at which the job begins to leave the nodes."""


@dataclass(frozen=True)
class Departure:
    """Why the job must leave a node."""

    reason: str
    by: float | None = None
    """When the node will be taken away, in seconds since the epoch; None if unknown."""


def departures(
    names: Collection[str],
    planned: Iterable[tuple[str, str, float, float]],
    bad: Iterable[Mapping[str, str]],
    now: float,
) -> dict[str, Departure]:
    """Which of the nodes ``names`` the job must leave.

    ``planned``: the maintenance of nodes, each with its name, the nodes in Slurm's notation, and when it begins and
    ends, in seconds since the epoch as ``now``. ``bad``: by node name, why the job must not use a node. The first
    reason found for a node counts.
    """
    found: dict[str, Departure] = {}
    for reasons in bad:
        for name in filter(reasons.__contains__, names):
            found.setdefault(name, Departure(reasons[name]))
    for title, nodes, start, end in sorted(planned, key=lambda each: each[2]):
        if start - AHEAD <= now < end:
            for name in filter(name_matcher(nodes), names):
                before = found.get(name)
                if before is None or before.by is None:
                    found[name] = Departure(before.reason if before else f"maintenance in Slurm: {title}", start)
    return found
