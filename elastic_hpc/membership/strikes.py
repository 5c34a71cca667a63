"""Nodes that failed under a job: which of them it avoids when it comes back from the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

EXPIRY = timedelta(hours=24)
"""By then a node that is broken for good has been drained by the site, and one that is not has been repaired."""


@dataclass(frozen=True)
class Strike:
    """One failure of one node."""

    node: str
    time: float
    """Seconds since the epoch."""
    reason: str


def load(saved: Iterable[Mapping[str, Any]]) -> tuple[Strike, ...]:
    """The strikes from ``state.json``; an entry that is not one is left out."""
    found = []
    for each in saved:
        try:
            found.append(Strike(str(each["node"]), float(each["time"]), str(each["reason"])))
        except (KeyError, TypeError, ValueError):
            continue
    return tuple(found)


def dump(strikes: Iterable[Strike]) -> list[dict[str, Any]]:
    """``strikes`` for ``state.json``."""
    return [asdict(strike) for strike in strikes]


def live(strikes: Iterable[Strike], now: float) -> tuple[Strike, ...]:
    """``strikes`` that count at ``now``; one from the future does, as clocks of nodes differ."""
    return tuple(strike for strike in strikes if now - strike.time < EXPIRY.total_seconds())


def excluded(strikes: Collection[Strike], now: float, usable: Collection[str], nodes_wanted: int) -> tuple[str, ...]:
    """The nodes to exclude at a requeue, those with most live strikes first, then the latest ones.

    ``usable`` nodes are those that Slurm could give to the job. At least ``nodes_wanted`` of them stay, if there are so
    many: a bad node is better than a job that never starts. Nodes that are not usable are no choice of Slurm's now, but
    they are excluded as well, as they may be back before the job starts.
    """
    counts, latest = Counter[str](), dict[str, float]()
    for strike in live(strikes, now):
        counts[strike.node] += 1
        latest[strike.node] = max(strike.time, latest.get(strike.node, strike.time))
    chosen, left = [], len(set(usable))
    for node in sorted(counts, key=lambda node: (-counts[node], -latest[node], node)):
        if node in usable:
            if left <= nodes_wanted:
                continue
            left -= 1
        chosen.append(node)
    return tuple(chosen)


def readmitted(strikes: Iterable[Strike], excluded: Collection[str]) -> tuple[str, ...]:
    """Nodes with a strike that are not to be excluded any more: the job's list of exclusions may still have them."""
    return tuple(sorted({strike.node for strike in strikes} - set(excluded)))
