"""The files with the events of a job, ``events.NODE.jsonl`` in its run directory: one for each node that has led.

Two leaders may write at the same time: a leader that is cut off may not know that another node has taken over. Lines
that two machines append to one file overwrite each other on NFS, so each node has a file of its own. A reader merges
the files.
"""

from __future__ import annotations

import errno
import fnmatch
import heapq
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.record.folders import look_again


def event_files(folder: Path) -> list[Path]:
    """The files of events in ``folder``, none if there is no such folder. An early version wrote a single file,
    ``events.jsonl``. Raises OSError.
    """
    try:
        look_again(folder)
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(fnmatch.filter(names, "events*.jsonl"))]


def append_event(folder: Path, node: str, when: float, event: str, fields: Mapping[str, Any]) -> None:
    """Called on ``node``: append one line to the events of this node: ``time`` (``when``, seconds since the epoch),
    ``event``, ``fields``. If the last line there has no end, a new line is begun. Raises OSError.
    """
    line = (json.dumps({"time": when, "event": event, **fields}) + "\n").encode()
    descriptor = os.open(folder / f"events.{node}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


class EventReader:
    """Reads the events of a job as they are written."""

    def __init__(self, folder: Path, *, for_screens: bool = False) -> None:
        """``folder``: the run directory. ``for_screens``: leave out most progress events where many are read at once,
        and keep none in ``events``, so that ``events`` stays short however long a job runs.
        """
        self._folder, self._for_screens = folder, for_screens
        self._files: dict[Path, _EventFile] = {}
        self.is_new_story = False
        """Whether the last call of ``read`` has returned events that belong before the events of an earlier call:
        another leader wrote them later, or another file took the place of one that was read.
        """

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events that were read. The events of one leader are in the order in which it wrote them, the events of
        several leaders in order of time, by the clocks of their nodes.
        """
        return _merged(file.events for file in self._files.values())

    @property
    def damaged(self) -> int:
        """The number of lines that are not events."""
        return sum(file.damaged for file in self._files.values())

    def read(self) -> list[dict[str, Any]]:
        """Add the events that were written since the last call to ``events``, and return them, in the same order; a
        last line without an end is left for the next call. Raises ElasticError if a file cannot be read.
        """
        try:
            paths = event_files(self._folder)
        except OSError as error:
            raise ElasticError(f"{self._folder}: {error.strerror}") from error
        files = [self._files.setdefault(path, _EventFile(path, for_screens=self._for_screens)) for path in paths]
        before = {file: file.last for file in files}
        added = {file: file.read() for file in files}
        self.is_new_story = any(
            events and events[0]["time"] < last
            for file, events in added.items()
            for other, last in before.items()
            if other is not file
        ) or any(file.was_replaced for file in files)
        return _merged(added.values())


def _merged(events: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return list(heapq.merge(*events, key=lambda event: event["time"]))


_CHUNK = 1 << 20
_MOST = 256
"""Number of progress lines of a chunk (about 6,000 lines) that are kept for screens, besides the last of each round."""
_LAST = 8
"""The number of last progress lines that are all kept: they show the speed."""
_PROGRESS = b'"event": "progress"'


def _thinned(lines: list[bytes]) -> list[bytes]:
    """``lines`` without most of the progress lines, if there are many."""
    progress = [number for number, line in enumerate(lines) if _PROGRESS in line[:60]]
    if len(progress) <= _MOST:
        return lines
    left_out = set(progress).difference(progress[:: len(progress) // _MOST], progress[-_LAST:])
    left_out = {number for number in left_out if _PROGRESS in lines[number + 1][:60]}  # not the last of a round
    return [line for number, line in enumerate(lines) if number not in left_out]


class _EventFile:
    def __init__(self, path: Path, *, for_screens: bool) -> None:
        self._path, self._for_screens = path, for_screens
        self._offset = 0
        self.events: list[dict[str, Any]] = []
        self.last = float("-inf")
        """The latest time of an event that was read."""
        self.was_replaced = False
        self.damaged = 0

    def read(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any] | None] = []
        rest = b""
        try:
            with open(self._path, "rb") as file:
                self.was_replaced = os.fstat(file.fileno()).st_size < self._offset  # another file has replaced it
                if self.was_replaced:
                    self._offset, self.events, self.damaged = 0, [], 0
                file.seek(self._offset)
                while chunk := file.read(_CHUNK):
                    *lines, rest = (rest + chunk).split(b"\n")
                    found.extend(map(_parsed, filter(None, _thinned(lines) if self._for_screens else lines)))
                self._offset = file.tell() - len(rest)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ElasticError(f"{self._path}: {error.strerror}") from error
        added = [event for event in found if event is not None]
        self.damaged += len(found) - len(added)
        self.events += (event for event in added if not self._for_screens or event["event"] != "progress")
        self.last = max((float(event["time"]) for event in added), default=self.last)
        return added


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event in ``line``; None if there is none."""
    try:
        body = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(body, dict) and isinstance(body.get("event"), str)
    return body if is_event and isinstance(body.get("time"), (int, float)) else None
