"""How fast a job trains on a number of nodes: measured, or inferred from measurements. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from elastic_hpc.errors import UsageError
from elastic_hpc.view.story import Story

_EXPECTED = "expected lines of NODES STEPS_PER_SECOND, for example: 4 1.9"


def speeds(story: Story) -> dict[int, float]:
    """Steps per second by the number of nodes, ascending, over all rounds of that size, each from its first step on."""
    steps: Counter[int] = Counter()
    seconds: dict[int, float] = {}
    for round in story.rounds:
        if round.first is not None and round.last is not None and round.last_at > round.first_at:
            nodes = len(round.nodes)
            steps[nodes] += round.last - round.first
            seconds[nodes] = seconds.get(nodes, 0.0) + round.last_at - round.first_at
    return {nodes: steps[nodes] / seconds[nodes] for nodes in sorted(seconds) if steps[nodes] > 0}


def efficiency(found: Mapping[int, float]) -> dict[int, float]:
    """The speed per node, as a share of the speed per node on the fewest nodes, by the number of nodes."""
    least = min(found, default=1)
    return {nodes: speed / nodes / (found[least] / least) for nodes, speed in found.items()}


@dataclass(frozen=True)
class Scaling:
    """The speed on any number of nodes. Between two known sizes, and beyond them, the speed follows a power of the
    number of nodes; beyond them, the power is at least 0 and at most 1. With one known size, the power is 1.
    """

    known: Mapping[int, float]
    """Steps per second by the number of nodes; for linear scaling, 1 for 1."""

    @classmethod
    def parse(cls, text: str) -> Scaling:
        """Lines of ``NODES STEPS_PER_SECOND``; ``#`` begins a comment. Raises UsageError."""
        known: dict[int, float] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not (words := line.partition("#")[0].replace(",", " ").split()):
                continue
            try:
                nodes, speed = int(words[0]), float(words[1])
            except (ValueError, IndexError):
                nodes, speed = 0, 0.0
            if nodes < 1 or not 0 < speed < math.inf or len(words) != 2:
                raise UsageError(f"line {number}, {line.strip()!r}: {_EXPECTED}")
            known[nodes] = speed
        if not known:
            raise UsageError(f"no line: {_EXPECTED}")
        return cls(known)

    def speed(self, nodes: int) -> float:
        """Steps per second on ``nodes``."""
        if nodes in self.known:
            return self.known[nodes]
        sizes = sorted(self.known)
        pairs = list(pairwise(sizes)) or [(sizes[0], sizes[0])]
        low, high = next((pair for pair in pairs if nodes < pair[1]), pairs[-1])
        power = math.log(self.known[high] / self.known[low]) / math.log(high / low) if low < high else 1.0
        if not low < nodes < high:
            power = min(1.0, max(0.0, power))
        base = high if nodes > high else low
        return self.known[base] * math.pow(nodes / base, power)


LINEAR = Scaling({1: 1.0})
