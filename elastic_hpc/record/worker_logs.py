"""The output of the workers, in order over ranks and rounds, and as it grows. Reads files."""

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
"""Bytes; a longer line is shown in parts, as a progress bar may never end its line."""


@dataclass(frozen=True)
class LogLine:
    """One line that a worker wrote. ``time``: when, in seconds since the epoch by the clock of its node; exact to a
    second at first, and to half a minute after an hour.
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
    """Which lines; None for all. By default the lines of rank 0, and what any rank wrote to stderr. ``nodes`` are
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
    """The files in ``folder``, the ``logs`` of a run directory, that are wanted, the oldest round first."""
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
    """The files in ``folder``, the ``logs`` of a run directory, that the worker of ``rank`` wrote, one a round."""
    return [source.path for source in _sources(folder, Wanted(ranks=(rank,), streams=(stream,)))]


def summary(folder: Path) -> str:
    """The rounds, ranks and nodes that have files in ``folder``, the ``logs`` of a run directory; empty for none."""
    sources = _sources(folder, Wanted(streams=("out", "err")))
    if not sources:
        return ""
    rounds, ranks = (spans(sorted(numbers)) for numbers in ({s.round for s in sources}, {s.rank for s in sources}))
    return f"rounds {rounds}, ranks {ranks}, nodes {fold({source.node for source in sources})}"


class _Tail:
    """Reads the lines that were added to a file since the last call."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._offset = 0
        self._partial = b""
        """The beginning of a line whose end is not written yet."""
        self._stamps = Stamps(source.path)

    def read(self, *, now: float | None = None) -> list[LogLine]:
        """Some of the lines, none at the end of the file. ``now``: when they were added; None to look that up."""
        added_lines: list[LogLine] = []
        while not added_lines:
            try:
                with open(self._source.path, "rb") as file:
                    file.seek(self._offset)
                    added = file.read(_CHUNK)
            except OSError:
                return []
            if not added:
                return []
            begin = self._offset - len(self._partial)
            self._offset += len(added)
            *lines, self._partial = (self._partial + added).split(b"\n")
            for text in lines:
                begin += len(text) + 1
                added_lines.append(self._line(text, begin, now))
            if len(self._partial) > _PARTIAL:
                added_lines.extend(self.rest(now=now))
        return added_lines

    def all(self, *, rest: bool) -> Iterator[LogLine]:
        """All lines, with ``rest`` also a last line without an end."""
        while lines := self.read():
            yield from lines
        if rest:
            yield from self.rest()

    def rest(self, *, now: float | None = None) -> list[LogLine]:
        """A last line without an end."""
        text, self._partial = self._partial, b""
        return [self._line(text, self._offset, now)] if text else []

    def _line(self, text: bytes, end: int, now: float | None) -> LogLine:
        shown = text.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")  # of a progress bar its last state
        time, source = self._stamps.at(end) if now is None else now, self._source
        return LogLine(time, source.round, source.node, source.rank, source.stream, shown)


class Logs:
    """The wanted lines in ``folder``, the ``logs`` of a run directory: those written so far, and those added later."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self._folder, self._wanted = folder, wanted
        self._tails: dict[Path, _Tail] = {}

    def written(self, *, follow: bool = False) -> Iterator[LogLine]:
        """All lines so far, round after round, in each round in order of time. ``follow``: leave a last line that has
        no end yet to ``added``.
        """
        rounds: dict[tuple[int, int], list[_Tail]] = {}
        for source, tail in self._update():
            rounds.setdefault((source.run, source.round), []).append(tail)
        for tails in rounds.values():
            yield from heapq.merge(*(tail.all(rest=not follow) for tail in tails), key=lambda line: line.time)

    def added(self, now: float) -> Iterator[LogLine]:
        """The lines that were added since the last call."""
        for _, tail in self._update():
            while lines := tail.read(now=now):
                yield from lines

    def rest(self, now: float) -> Iterator[LogLine]:
        """The last lines without an end, when nothing more will be written."""
        for tail in self._tails.values():
            yield from tail.rest(now=now)

    def _update(self) -> list[tuple[_Source, _Tail]]:
        """All files so far."""
        sources = _sources(self._folder, self._wanted)
        for source in sources:
            if source.path not in self._tails:
                self._tails[source.path] = _Tail(source)
        return [(source, self._tails[source.path]) for source in sources]
