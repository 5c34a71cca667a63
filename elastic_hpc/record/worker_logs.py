"""The format of the workers' log files, and a reader that orders their lines across ranks and rounds, even while the
files grow. Reads files.

The agent of each node writes the output of its workers to one file per round,
``logs/RUN.ROUND/NODE.rankFIRST-LAST.log``. Each line has a label, as in the log files of container runtimes::

    2026-11-28T21:44:05.123Z rank3 out F step 17, loss 0.42

with the time at which the agent read the line, the rank, the stream, and ``F`` for a full line. ``P`` marks a part of a
line; the rest follows under the next label of that rank and stream.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from elastic_hpc.membership.nodes import NumberRanges, fold, name_matcher, spans
from elastic_hpc.record.folders import look_again

Stream = Literal["out", "err"]

_ROUND = re.compile(r"(\d+)\.(\d+)")
_FILE = re.compile(r"(.+)\.rank([\d,-]+)\.log")
_LINE = re.compile(rb"(\S+) rank(\d+) (out|err) ([FP]) (.*)", re.DOTALL)
_FULL = re.compile(rb"\S+ rank\d+ (?:out|err) F ")
_CHUNK = _END = 1 << 20
_PARTIAL = 64 * 1024
"""In bytes. A longer line is shown in parts, as a progress bar may never end its line."""


def file_name(node: str, ranks: Sequence[int]) -> str:
    """The name of the log file, in the folder of a round, of ``node`` whose workers have ``ranks``."""
    return f"{node}.rank{spans(sorted(ranks))}.log"


def label(rank: int, stream: Stream, when: float, *, full: bool = True) -> bytes:
    """The label of a line, or of a part of a line, that the agent read at ``when``, in seconds since the epoch."""
    return f"{_moment(when)} rank{rank} {stream} {'F' if full else 'P'} ".encode()


def _moment(when: float) -> str:
    """``when`` as in a label. These texts sort in order of time."""
    moment = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="milliseconds").partition("+")[0]
    return f"{moment}Z"


@lru_cache
def _seconds(moment: bytes) -> float:
    return datetime.fromisoformat(f"{moment.decode().removesuffix('Z')}+00:00").timestamp()


class LogLine(NamedTuple):
    """One line that a worker wrote. ``time``: when the agent read the line, in seconds since the epoch by the clock of
    the node; at most about a tenth of a second after the worker wrote the line.
    """

    time: float
    round: int
    node: str
    rank: int
    stream: Stream
    written: str
    """The line as it was written, with its end."""

    @property
    def text(self) -> str:
        """The line as a terminal would show it: without its end; for a progress bar, its last state."""
        return self.written.rstrip("\r\n").rpartition("\r")[2]


@dataclass(frozen=True)
class Wanted:
    """Which lines to read; None for all. By default the lines of rank 0, and what any rank wrote to stderr. ``nodes``
    are in Slurm's notation, and may be patterns: see ``membership.nodes.name_matcher``. ``since``: in seconds since the
    epoch. ``pattern`` must match somewhere in the text of a line, as shown.
    """

    ranks: Container[int] | None = None
    nodes: Collection[str] | None = None
    rounds: Container[int] | None = None
    streams: Collection[Stream] | None = None
    since: float | None = None
    pattern: re.Pattern[str] | None = None

    def may_have(self, file: _File) -> bool:
        return (
            (self.ranks is None or any(rank in self.ranks for rank in file.ranks))
            and (self.nodes is None or any(name_matcher(nodes)(file.node) for nodes in self.nodes))
            and (self.rounds is None or file.round in self.rounds)
        )

    def has(self, rank: int, stream: Stream) -> bool:
        if self.ranks is None and self.nodes is None and self.streams is None:
            return rank == 0 or stream == "err"
        return (self.ranks is None or rank in self.ranks) and (self.streams is None or stream in self.streams)


@dataclass(frozen=True, order=True)
class _File:
    """What the workers of one node wrote in one round."""

    run: int
    round: int
    ranks: tuple[int, ...]
    node: str
    path: Path


def _files(folder: Path, wanted: Wanted, without: Container[str] = ()) -> list[_File]:
    """The files in ``folder``, the ``logs`` of a run directory, that may have wanted lines, the oldest round first.
    ``without``: names of folders of rounds to leave out.
    """
    found = []
    with contextlib.suppress(OSError):
        look_again(folder)
    for of_round in folder.glob("*.*"):
        number = _ROUND.fullmatch(of_round.name)
        for path in of_round.glob("*.log") if number and of_round.name not in without else ():
            if number and (name := _FILE.fullmatch(path.name)):
                ranks = tuple(rank for span, _ in NumberRanges.of(name[2]).ranges for rank in span)
                file = _File(int(number[1]), int(number[2]), ranks, name[1], path)
                if wanted.may_have(file):
                    found.append(file)
    return sorted(found)


def files(folder: Path, rank: int) -> list[Path]:
    """The files in ``folder``, the ``logs`` of a run directory, with the output of ``rank``, one for each round."""
    return [file.path for file in _files(folder, Wanted(ranks=(rank,)))]


def summary(folder: Path) -> str:
    """The rounds, ranks and nodes that have files in ``folder``, the ``logs`` of a run directory; empty for none."""
    found = _files(folder, Wanted(streams=("out", "err")))
    if not found:
        return ""
    rounds, ranks = {file.round for file in found}, {rank for file in found for rank in file.ranks}
    return f"rounds {spans(sorted(rounds))}, ranks {spans(sorted(ranks))}, nodes {fold({file.node for file in found})}"


class _Tail:
    """Reads the wanted lines that were added to a file since the last call."""

    def __init__(self, file: _File, wanted: Wanted, most: int | None = None) -> None:
        """``most``: begin at most this many bytes before the end."""
        self._file, self._wanted = file, wanted
        self._offset = 0
        if most is not None:
            with contextlib.suppress(OSError):
                self._offset = max(0, file.path.stat().st_size - most)
        self._unread = b" " if self._offset else b""  # no label begins like this: skips the first line
        """The beginning of a labelled line whose end is not in the file yet."""
        self._begun: dict[tuple[int, Stream], tuple[float, bytes]] = {}
        """The beginnings of lines without an end so far."""
        self._chooses = wanted.since is not None or wanted.pattern is not None
        self._since = b"" if wanted.since is None else _moment(wanted.since).encode()

    def read(self) -> list[LogLine]:
        """Some of the lines, none at the end of the file."""
        added: list[LogLine] = []
        while not added:
            try:
                with open(self._file.path, "rb") as file:
                    file.seek(self._offset)
                    chunk = file.read(_CHUNK)
            except OSError:
                break
            if not chunk:
                break
            self._offset += len(chunk)
            *lines, self._unread = (self._unread + chunk).split(b"\n")
            for line in lines:
                if line < self._since and not self._begun and _FULL.match(line):
                    continue  # too old: known without parsing the line, which takes ten times as long
                parsed = self._parse(line)
                added.extend(filter(self._is_wanted, parsed) if self._chooses else parsed)
        return added

    def all(self, *, rest: bool) -> Iterator[LogLine]:
        """All lines; with ``rest``, including last lines without an end."""
        while lines := self.read():
            yield from lines
        if rest:
            yield from self.rest()

    def rest(self) -> list[LogLine]:
        """Last lines without an end."""
        begun, self._begun = self._begun, {}
        lines = [self._line(when, rank, stream, text) for (rank, stream), (when, text) in begun.items()]
        return list(filter(self._is_wanted, lines))

    def _is_wanted(self, line: LogLine) -> bool:
        """Whether text and time of a line are wanted; rank and stream were checked before."""
        since, pattern = self._wanted.since, self._wanted.pattern
        return (since is None or line.time >= since) and (pattern is None or pattern.search(line.text) is not None)

    def _parse(self, line: bytes) -> Iterator[LogLine]:
        """The line that ``line`` completes; none if ``line`` is unwanted, a part, or damaged by a full disk."""
        match = _LINE.fullmatch(line)
        if match is None:
            return
        when, rank, full = _seconds(match[1]), int(match[2]), match[4] == b"F"
        stream: Stream = "out" if match[3] == b"out" else "err"
        if not self._wanted.has(rank, stream):
            return
        _, begun = self._begun.pop((rank, stream), (0.0, b""))
        text = begun + match[5] + b"\n" * full
        if full or len(text) > _PARTIAL:
            yield self._line(when, rank, stream, text)
        else:
            self._begun[rank, stream] = when, text

    def _line(self, when: float, rank: int, stream: Stream, text: bytes) -> LogLine:
        return LogLine(when, self._file.round, self._file.node, rank, stream, text.decode(errors="replace"))


class Logs:
    """The wanted lines in ``folder``, the ``logs`` of a run directory: the lines written so far, and the lines added
    later.
    """

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self._folder, self._wanted = folder, wanted
        self._tails: dict[Path, _Tail] = {}
        self._over: set[str] = set()
        """The folders of rounds to which nothing more is written."""

    @property
    def size(self) -> int:
        """How many files a call of ``added`` reads."""
        return sum(path.parent.name not in self._over for path in self._tails)

    def written(self, *, follow: bool = False) -> Iterator[LogLine]:
        """All lines so far, round after round, in each round in order of time. ``follow``: leave a last line that has
        no end yet to ``added``.
        """
        rounds: dict[tuple[int, int], list[_Tail]] = {}
        for file, tail in self._update():
            rounds.setdefault((file.run, file.round), []).append(tail)
        for tails in rounds.values():
            yield from heapq.merge(*(tail.all(rest=not follow) for tail in tails), key=lambda line: line.time)

    def last(self, count: int) -> list[LogLine]:
        """Instead of ``written``: up to ``count`` of the last lines, from the ends of the files. A last line that has
        no end yet, in the last two rounds, is left to ``added``. Rounds that are not needed are never read.
        """
        rounds: dict[str, list[_File]] = {}
        for file in _files(self._folder, self._wanted):
            rounds.setdefault(file.path.parent.name, []).append(file)
        lines: list[LogLine] = []
        for newer, (name, files) in enumerate(reversed(rounds.items())):
            if len(lines) >= count and newer >= 2:
                self._over.add(name)
                continue
            tails = [_Tail(file, self._wanted, _END) for file in files]
            self._tails.update({file.path: tail for file, tail in zip(files, tails, strict=True)})
            merged = heapq.merge(*(tail.all(rest=newer >= 2) for tail in tails), key=lambda line: line.time)
            lines = [*merged, *lines]
        return lines[-count:]

    def added(self) -> Iterator[LogLine]:
        """The lines that were added since the last call. A round is read until two other rounds have followed it."""
        found = self._update()
        over = list(dict.fromkeys(file.path.parent.name for file, _ in found))[:-2]
        for file, tail in found:
            yield from tail.all(rest=file.path.parent.name in over)
        self._over.update(over)

    def rest(self) -> Iterator[LogLine]:
        """The last lines without an end, when nothing more will be written."""
        for tail in self._tails.values():
            yield from tail.rest()

    def _update(self) -> list[tuple[_File, _Tail]]:
        """All files so far."""
        found = _files(self._folder, self._wanted, self._over)
        for file in found:
            if file.path not in self._tails:
                self._tails[file.path] = _Tail(file, self._wanted)
        return [(file, self._tails[file.path]) for file in found]
