"""What the workers wrote, put in order over ranks and rounds, and followed as it grows. Reads files."""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elastic_hpc.membership.nodes import fold, name_matcher, spans
from elastic_hpc.record.stamps import Stamps

Stream = Literal["out", "err"]

_ROUND = re.compile(r"(\d+)\.(\d+)")
_FILE = re.compile(r"rank(\d+)\.(out|err)")
_CHUNK = 1 << 20
_PARTIAL = 64 * 1024
"""A line longer than this is shown in parts: a progress bar may never end one."""


@dataclass(frozen=True)
class Line:
    """One line that a worker wrote. ``time``: when, within a second at first and half a minute after an hour; in
    seconds since the epoch on its node.
    """

    time: float
    round: int
    node: str
    rank: int
    stream: Stream
    text: str
    """Without its end."""


@dataclass(frozen=True)
class Wanted:
    """Which lines; None for all. By default those of rank 0, and what any rank wrote to stderr. ``nodes`` are
    in Slurm's notation, and may be patterns: see ``membership.nodes.name_matcher``.
    """

    ranks: Container[int] | None = None
    nodes: Collection[str] | None = None
    rounds: Container[int] | None = None
    streams: Collection[Stream] | None = None

    def has(self, source: _Source) -> bool:
        if self.ranks is None and self.nodes is None and self.streams is None:
            chosen = source.rank == 0 or source.stream == "err"
        else:
            chosen = self.ranks is None or source.rank in self.ranks
        return (
            chosen
            and (self.nodes is None or any(name_matcher(nodes)(source.node) for nodes in self.nodes))
            and (self.rounds is None or source.round in self.rounds)
            and (self.streams is None or source.stream in self.streams)
        )


@dataclass(frozen=True, order=True)
class _Source:
    """One file."""

    run: int
    round: int
    rank: int
    stream: Stream
    node: str
    path: Path


def _sources(folder: Path, wanted: Wanted) -> list[_Source]:
    """The files in a run directory's ``logs`` that are wanted, the oldest round first."""
    found = []
    for path in folder.glob("*/*/rank*.*"):
        number, file = _ROUND.fullmatch(path.parts[-3]), _FILE.fullmatch(path.name)
        if number and file:
            stream: Stream = "out" if file[2] == "out" else "err"
            source = _Source(int(number[1]), int(number[2]), int(file[1]), stream, path.parts[-2], path)
            if wanted.has(source):
                found.append(source)
    return sorted(found)


def files(folder: Path, rank: int, stream: Stream) -> list[Path]:
    """Those in a run directory's ``logs`` that the worker of ``rank`` has written, one for each round."""
    return [source.path for source in _sources(folder, Wanted(ranks=(rank,), streams=(stream,)))]


def what_there_is(folder: Path) -> str:
    """The rounds, ranks and nodes of which there are files in a run directory's ``logs``; empty if there is none."""
    sources = _sources(folder, Wanted(streams=("out", "err")))
    if not sources:
        return ""
    rounds, ranks = (spans(sorted(numbers)) for numbers in ({s.round for s in sources}, {s.rank for s in sources}))
    return f"rounds {rounds}, ranks {ranks}, nodes {fold({source.node for source in sources})}"


class _Tail:
    """The lines that were added to a file since the last look."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._offset = 0
        self._begun = b""
        self._stamps = Stamps(source.path)

    def read(self, *, now: float | None = None) -> list[Line]:
        """Some, none at its end. ``now``: when they came; None to look it up."""
        found: list[Line] = []
        while not found:
            try:
                with open(self._source.path, "rb") as file:
                    file.seek(self._offset)
                    added = file.read(_CHUNK)
            except OSError:
                return []
            if not added:
                return []
            begin = self._offset - len(self._begun)
            self._offset += len(added)
            *whole, self._begun = (self._begun + added).split(b"\n")
            for text in whole:
                begin += len(text) + 1
                found.append(self._line(text, begin, now))
            if len(self._begun) > _PARTIAL:
                found.extend(self.rest(now=now))
        return found

    def drain(self, *, rest: bool) -> Iterator[Line]:
        """All there are, with ``rest`` also a last one that has no end."""
        while lines := self.read():
            yield from lines
        if rest:
            yield from self.rest()

    def rest(self, *, now: float | None = None) -> list[Line]:
        """A last line that has no end."""
        text, self._begun = self._begun, b""
        return [self._line(text, self._offset, now)] if text else []

    def _line(self, text: bytes, end: int, now: float | None) -> Line:
        shown = text.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")  # of a progress bar its last state
        one = self._source
        return Line(self._stamps.at(end) if now is None else now, one.round, one.node, one.rank, one.stream, shown)


class Logs:
    """The lines in a run directory's ``logs``: those that are there, and those that come."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self._folder, self._wanted = folder, wanted
        self._tails: dict[Path, _Tail] = {}

    def there(self, *, follow: bool = False) -> Iterator[Line]:
        """All lines that are there, round after round, in each in order of time. ``follow``: ``added`` will be called;
        a last line that has no end yet is left to it.
        """
        rounds: dict[tuple[int, int], list[_Tail]] = {}
        for source, tail in self._look():
            rounds.setdefault((source.run, source.round), []).append(tail)
        for tails in rounds.values():
            yield from heapq.merge(*(tail.drain(rest=not follow) for tail in tails), key=lambda line: line.time)

    def added(self, now: float) -> Iterator[Line]:
        """What has come since the last call."""
        for _, tail in self._look():
            while lines := tail.read(now=now):
                yield from lines

    def rest(self, now: float) -> Iterator[Line]:
        """Last lines without an end, when no more will come."""
        for tail in self._tails.values():
            yield from tail.rest(now=now)

    def _look(self) -> list[tuple[_Source, _Tail]]:
        sources = _sources(self._folder, self._wanted)
        for source in sources:
            if source.path not in self._tails:
                self._tails[source.path] = _Tail(source)
        return [(source, self._tails[source.path]) for source in sources]
