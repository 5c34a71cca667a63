"""Many nodes in few words: ranges of numbers, and names in Slurm's notation. Pure.

ClusterShell folds names too, in several dimensions. For a thousand like ``ip-10-0-37-91`` that takes it a second, and
here the leader does it among its heartbeats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

MOST = 1 << 17
"""Nodes that a range may stand for; more can only be a mistake."""


def spans(numbers: Iterable[int], width: int = 0) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7, in the order given; of ``width`` digits at least."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(
        f"{first:0{width}}" if first == last else f"{first:0{width}}-{last:0{width}}" for first, last in found
    )


def numbers(text: str) -> tuple[int, ...]:
    """The numbers that ``spans`` has written as ``text``. Raises ValueError."""
    found: list[int] = []
    for span in text.split(",") if text else ():
        first, dash, last = span.partition("-")
        begin, end = int(first), int(last if dash else first)
        if end - begin + len(found) >= MOST:
            raise ValueError(f"{span}: more than {MOST} nodes")
        found.extend(range(begin, end + 1))
    return tuple(found)


def fold(names: Iterable[str]) -> str:
    """Slurm's notation for ``names``: ``login,n[001-004,007]``."""
    rest: list[str] = []
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in names:
        if parts := re.fullmatch(r"(.*?)(\d+)(\D*)", name):
            groups[parts[1], parts[3]].add(parts[2])
        else:
            rest.append(name)
    for (before, after), digits in groups.items():
        padded = any(each.startswith("0") and len(each) > 1 for each in digits)
        for width in sorted({len(each) for each in digits}) if padded else [0]:
            those = sorted(int(each) for each in digits if not padded or len(each) == width)
            text = spans(those, width)
            rest.append(f"{before}[{text}]{after}" if len(those) > 1 else f"{before}{text}{after}")
    return ",".join(sorted(rest))
