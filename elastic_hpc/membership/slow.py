"""Which nodes are slower than the others (``--slow-node``). Pure.

In a step all ranks wait for the slowest, so their steps take the same time. What shows a slow node is the time that its
workers take in a step before their first collective. Each agent reports to the leader how long that took recently
(``Pace``), and the leader compares the nodes (``SlowWatch``). There is no clock here: only steps are counted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

AFTER = 192
"""Steps of a round after which its nodes are compared: the first steps compile, and fill caches."""

FOR = 32
"""Steps for which a node must be slower before it is named."""

WELL_FOR = 64
"""Steps for which a node that was named must be fast again."""

EXCESS = 0.005
"""Least difference in seconds: the noise of short steps means nothing."""

CLEARLY = 2.0
"""With two nodes, it is less certain which node is to blame, so the job leaves the slower node only at this factor."""

_STRAY = 16
"""The longest of this many steps does not count: it may include a save or an evaluation."""

_LONG = 10
"""A step counts as at most this many times the median."""


class Pace(NamedTuple):
    """How fast the workers of one node are in the running round."""

    steps: int = 0
    """How many steps of each of its workers were measured."""
    seconds: float = 0.0
    """The time that the slowest worker recently took in a step before its first collective."""

    @classmethod
    def of(cls, values: Any) -> Pace:
        """From a message. Raises TypeError or ValueError."""
        steps, seconds = values
        if not math.isfinite(seconds):
            raise ValueError(f"seconds {seconds!r}: expected a number")
        return cls(int(steps), float(seconds))


NO_PACE = Pace()


def usual(times: Collection[float]) -> float:
    """The mean of ``times``, without the longest. A median would not do: a process that has used up its share of a CPU
    may pause in every fifth step, and do all other steps at full speed.
    """
    order = sorted(times)
    kept = order[: len(order) - len(order) // _STRAY]
    most = _LONG * order[len(order) // 2] if order else 0.0
    return math.fsum(min(time, most) for time in kept) / len(kept) if kept else 0.0


class Slow(NamedTuple):
    """A node that is slower than the others. Times in seconds."""

    node: int
    seconds: float
    others: float
    """The median of the other nodes."""
    sure: bool
    """Whether the job is better off without the node."""

    @property
    def times(self) -> float:
        """How many times longer its steps take than on the others."""
        return round(self.seconds / max(self.others, 1e-6), 2)

    @property
    def reason(self) -> str:
        own, others = (f"{1000 * seconds:.3g} ms" for seconds in (self.seconds, self.others))
        return f"slow node: {own} in a step before its collectives, {self.times:g} times the {others} of the others"


class Comparison(NamedTuple):
    """What the pace of the nodes has shown."""

    begun: Sequence[Slow] = ()
    """The nodes that are slow from now on."""
    ended: Sequence[int] = ()
    """The nodes that are no longer slow."""
    to_leave: Sequence[Slow] = ()
    """All slow nodes without which the job is better off."""


NO_DIFFERENCE = Comparison()


class SlowWatch:
    """The pace of the nodes under one leader. ``factor``: how many times as long makes a node slow."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self.named: set[int] = set()
        """The nodes that are slow, at most a minority; of two nodes one."""
        self._since: dict[int, int] = {}
        """The nodes that look as if that should change, with the number of steps since when."""

    def begin(self, nodes: Collection[int]) -> None:
        """A round of ``nodes`` begins. The measurement of their steps starts over."""
        self.named.intersection_update(nodes)
        self._since = {}

    def look(self, paces: Mapping[int, Pace]) -> Comparison:
        """``paces``: for all nodes of the round."""
        if len(paces) < 2 or min(pace.steps for pace in paces.values()) < AFTER:
            return NO_DIFFERENCE
        order = sorted(pace.seconds for pace in paces.values())
        found = {node: Slow(node, pace.seconds, *self._others(order, pace.seconds)) for node, pace in paces.items()}
        over = {node for node, slow in found.items() if self._is_over(slow, self._factor, EXCESS)}
        if len(over) > max(1, (len(paces) - 1) // 2):  # the nodes are of two kinds
            over = set(self.named)
        well = {node for node in self.named if not self._is_over(found[node], (1 + self._factor) / 2, EXCESS / 2)}
        changing = well | (over - self.named)
        self._since = {node: self._since.get(node, paces[node].steps) for node in changing}
        for_steps = {node: paces[node].steps - since for node, since in self._since.items()}
        begun = [node for node in sorted(over - self.named) if for_steps[node] >= FOR]
        ended = [node for node in sorted(well) if for_steps[node] >= WELL_FOR]
        self.named = (self.named | set(begun)) - set(ended)
        for node in (*begun, *ended):
            del self._since[node]
        to_leave = [found[node] for node in sorted(self.named & over) if found[node].sure]
        return Comparison([found[node] for node in begun], ended, to_leave)

    def _others(self, order: Sequence[float], own: float) -> tuple[float, bool]:
        """The median of ``order`` without ``own``, and whether ``own`` is far enough from it to act."""
        at, middle, count = order.index(own), (len(order) - 1) // 2, len(order) - 1
        high = order[middle + (middle >= at)]
        low = order[middle - 1 + (middle - 1 >= at)] if count % 2 == 0 else high
        others = (low + high) / 2
        return others, count > 1 or own >= CLEARLY * others

    @staticmethod
    def _is_over(slow: Slow, factor: float, excess: float) -> bool:
        return slow.seconds >= factor * slow.others and slow.seconds - slow.others >= excess
