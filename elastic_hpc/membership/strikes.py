"""Nodes that failed under a job, and which of them the job avoids after a requeue. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

EXPIRY = timedelta(hours=24)
"""Age at which a strike stops counting: by then the site has drained the node, or repaired it."""


NEVER_JOINED = "Slurm allocated the node, but its agent never connected"
"""The reason of a strike that is forgotten when an agent comes from that node."""


@dataclass(frozen=True)
class Strike:
    """One failure of one node."""

    node: str
    time: float
    """Seconds since the epoch."""
    reason: str
    signature: str = ""
    """Signature of the workers' failure for which the node is blamed (``causes.signature``); empty for a lost node."""
    step: int = -1
    """The last step before that failure; -1 for none."""


def load(saved: Iterable[Mapping[str, Any]]) -> tuple[Strike, ...]:
    """The strikes from ``state.json``; malformed entries are skipped."""
    found = []
    for entry in saved:
        try:
            signature, step = str(entry.get("signature", "")), int(entry.get("step", -1))
            found.append(Strike(str(entry["node"]), float(entry["time"]), str(entry["reason"]), signature, step))
        except (KeyError, TypeError, ValueError):
            continue
    return tuple(found)


def dump(strikes: Iterable[Strike]) -> list[dict[str, Any]]:
    """``strikes`` for ``state.json``."""
    return [asdict(strike) for strike in strikes]


def live(strikes: Iterable[Strike], now: float) -> tuple[Strike, ...]:
    """``strikes`` that count at ``now``. A strike from the future counts, as clocks of nodes differ."""
    return tuple(strike for strike in strikes if now - strike.time < EXPIRY.total_seconds())


def excluded(strikes: Collection[Strike], now: float, usable: Collection[str], nodes_wanted: int) -> tuple[str, ...]:
    """The nodes to exclude at a requeue. Nodes with most live strikes come first, then nodes with the latest strikes.

    ``usable`` are the nodes that Slurm could give to the job. At least ``nodes_wanted`` of them stay, if possible: a
    bad node is better than a job that never starts. Nodes that are not usable are excluded as well, as they may be back
    before the job starts.
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
    """Nodes with a strike that the job must no longer exclude: its list of excluded nodes may still have them."""
    return tuple(sorted({strike.node for strike in strikes} - set(excluded)))
