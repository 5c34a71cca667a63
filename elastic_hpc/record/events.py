"""The files with the events of a job, ``events.NODE.jsonl`` in its run directory: one for each node that has led.

Two leaders may write at the same time: a leader that is cut off does not know yet that another node has taken over.
Lines that two machines append to one file overwrite each other on NFS, so each node has a file of its own. A reader
merges the files.
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
    """The files of events in ``folder``, none if there is no such folder. An early version wrote one, ``events.jsonl``.
    Raises OSError.
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

    def __init__(self, folder: Path) -> None:
        """``folder``: the run directory."""
        self._folder = folder
        self._files: dict[Path, _EventFile] = {}
        self.events: list[dict[str, Any]] = []
        """All events that were read. Those of one leader are in the order in which it wrote them, those of several
        leaders in order of time, by the clocks of their nodes.
        """

    @property
    def damaged(self) -> int:
        """The number of lines that are no event."""
        return sum(file.damaged for file in self._files.values())

    def read(self) -> list[dict[str, Any]]:
        """Add the events that were written since the last call to ``events``, and return them, in the same order; a
        last line without an end is left for the next call. Raises ElasticError if a file cannot be read.
        """
        try:
            paths = event_files(self._folder)
        except OSError as error:
            raise ElasticError(f"{self._folder}: {error.strerror}") from error
        added = [self._files.setdefault(path, _EventFile(path)).read() for path in paths]
        self.events = _merged(file.events for file in self._files.values())
        return _merged(added)


def _merged(events: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return list(heapq.merge(*events, key=lambda event: event["time"]))


class _EventFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.events: list[dict[str, Any]] = []
        self.damaged = 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # another file has taken its place
                    self._offset, self.events, self.damaged = 0, [], 0
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ElasticError(f"{self._path}: {error.strerror}") from error
        added = added[: added.rfind(b"\n") + 1]
        self._offset += len(added)
        known = len(self.events)
        for line in filter(None, added.decode(errors="replace").split("\n")):
            try:
                body = json.loads(line)
            except (ValueError, RecursionError):
                body = None
            if (
                isinstance(body, dict)
                and isinstance(body.get("event"), str)
                and isinstance(body.get("time"), (int, float))
            ):
                self.events.append(body)
            else:
                self.damaged += 1
        return self.events[known:]
