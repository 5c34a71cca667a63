"""How nodes are numbered, and how sets of nodes are written: ranges of numbers, and names in Slurm's notation. Pure.

ClusterShell folds names too, in several dimensions, but needs a second for a thousand names like ``ip-10-0-37-91``.
That is too long here, as the leader folds names between its heartbeats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

FIRST_JOINER = 1 << 20
"""A joiner's number is this number plus the id of the job that brings it, as Slurm never reuses an id. Lower numbers
are the indices of the job's own nodes in Slurm's order.
"""

BATCH_HOST = 0
"""The number of the node on which the batch script runs."""

MAX_NODES = 1 << 17
"""Most nodes that a range may stand for; more can only be a mistake."""


def joiner(job_id: str) -> int:
    """The number of the node that the job ``job_id`` brings."""
    return FIRST_JOINER + int(job_id)


def votes(node: int) -> bool:
    """Whether ``node`` belongs to the job's own allocation, and so takes part in elections."""
    return node < FIRST_JOINER


def spans(numbers: Iterable[int], width: int = 0) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7, in the order given, with at least ``width`` digits."""
    all = list(numbers)
    begins = [at for at, (before, number) in enumerate(pairwise(all), 1) if number != before + 1]
    found = [(all[begin], all[end - 1]) for begin, end in pairwise([0, *begins, len(all)])] if all else ()
    return ",".join(
        f"{first:0{width}}" if first == last else f"{first:0{width}}-{last:0{width}}" for first, last in found
    )


def numbers(text: str) -> tuple[int, ...]:
    """The numbers that ``spans`` has written as ``text``. Raises ValueError."""
    found: list[int] = []
    for span in text.split(",") if text else ():
        first, dash, last = span.partition("-")
        begin, end = int(first), int(last if dash else first)
        if end - begin + len(found) >= MAX_NODES:
            raise ValueError(f"{span}: more than {MAX_NODES} nodes")
        found.extend(range(begin, end + 1))
    return tuple(found)


@dataclass(frozen=True)
class NumberRanges:
    """Numbers as a user types them, ``0-3,8``. They are never expanded, as a range may be of any length."""

    ranges: tuple[tuple[range, int], ...]
    """Each with the least number of digits, as in ``001-003``."""

    @classmethod
    def of(cls, text: str) -> NumberRanges:
        """Raises ValueError for text that is no number, and for a range that ends before it begins."""
        found = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
            if match is None:
                raise ValueError(f"{part!r} is no number and no range")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"{part!r} ends before it begins")
            found.append((range(first, last + 1), len(match[1])))
        return cls(tuple(found))

    def __contains__(self, number: object) -> bool:
        return any(number in span for span, _ in self.ranges)

    def has(self, digits: str) -> bool:
        """Whether the number ``digits`` is among these, written with as many leading zeros."""
        return any(int(digits) in span and digits == f"{int(digits):0{width}}" for span, width in self.ranges)


def count_names(text: str) -> int:
    """The number of names that ``text``, in Slurm's notation, stands for. Raises ValueError."""
    brackets = (re.findall(r"\[(.*?)\]", part) for part in _parts(text))
    return sum(prod(sum(len(span) for span, _ in NumberRanges.of(text).ranges) for text in part) for part in brackets)


def _parts(text: str) -> list[str]:
    parts: list[str] = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise ValueError("a bracket or a comma has no partner")
    return parts


@lru_cache
def name_matcher(text: str) -> Callable[[str], bool]:
    """A function that returns whether a node's name is among the names of ``text``: names in Slurm's notation, in which
    ``*`` stands for any text and ``?`` for any character. Raises ValueError.
    """
    matchers = [_part_matcher(part) for part in _parts(text)]
    return lambda name: any(matches(name) for matches in matchers)


def _part_matcher(part: str) -> Callable[[str], bool]:
    pieces = re.split(r"\[(.*?)\]", part)
    wanted = [NumberRanges.of(piece) for piece in pieces[1::2]]
    texts = ["".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in piece) for piece in pieces[::2]]
    pattern = re.compile(r"(?<!\d)(\d+)(?!\d)".join(texts), re.ASCII | re.DOTALL)

    def has(name: str) -> bool:
        if (match := pattern.fullmatch(name)) is None:
            return False
        return all(typed.has(digits) for typed, digits in zip(wanted, match.groups(), strict=True))

    return has


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
        padded = any(number.startswith("0") and len(number) > 1 for number in digits)
        for width in sorted({len(number) for number in digits}) if padded else [0]:
            folded = sorted(int(number) for number in digits if not padded or len(number) == width)
            text = spans(folded, width)
            rest.append(f"{before}[{text}]{after}" if len(folded) > 1 else f"{before}{text}{after}")
    return ",".join(sorted(rest))
