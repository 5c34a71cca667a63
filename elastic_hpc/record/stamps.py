"""When the workers wrote their lines. The workers' output files stay as the workers write them; a file beside them
notes how long each was at which time. So the lines of several ranks can be put in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

FILE = "times.jsonl"
"""In the folder of a round and node; each line has ``time`` and the sizes of the files that have grown."""

_FIRST, _LAST = 1.0, 30.0
"""Seconds between two looks: at first, and after a long time."""


class Stamper:
    """Notes how the output files of one round grow, on a thread of its own, as the file system may stall."""

    def __init__(self) -> None:
        self._over: threading.Event | None = None

    def start(self, files: Sequence[str]) -> None:
        """``files`` are in one folder. There are none if the workers write to the agent's output."""
        self.stop()
        self._over = threading.Event()
        if paths := list(dict.fromkeys(Path(file) for file in files if file)):
            threading.Thread(target=_note, args=(paths, self._over), name="stamps", daemon=True).start()

    def stop(self) -> None:
        """The workers have ended. The thread notes the last sizes, and ends; nobody waits for it."""
        if self._over:
            self._over.set()
            self._over = None


def _note(paths: Sequence[Path], over: threading.Event) -> None:
    began, noted = time.monotonic(), dict.fromkeys(paths, 0)
    with contextlib.suppress(OSError), open(paths[0].with_name(FILE), "a", opener=_private) as notes:
        ends = False
        while not ends:
            ends = over.wait(min(_LAST, max(_FIRST, (time.monotonic() - began) / 100)))
            now = time.time()
            sizes = {path: path.stat().st_size for path in paths}
            grown = {path.name: size for path, size in sizes.items() if size > noted[path]}
            noted = sizes
            if grown:
                notes.write(json.dumps({"time": now, **grown}) + "\n")
                notes.flush()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Stamps:
    """When the lines of one file were written."""

    def __init__(self, path: Path) -> None:
        """``path``: the file. Lines after the last note get the time of that note; without notes, that of the file."""
        self._sizes: list[int] = []
        self._times: list[float] = []
        last: float | None = None
        with contextlib.suppress(OSError):
            for line in path.with_name(FILE).read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                    body = json.loads(line)
                    last = float(body["time"])
                    if (size := body.get(path.name)) is not None:
                        self._sizes.append(int(size))
                        self._times.append(last)
        with contextlib.suppress(OSError):
            last = path.stat().st_mtime if last is None else last
        self._last = last or 0.0

    def at(self, offset: int) -> float:
        """When the line that ends at ``offset`` was noted first, in seconds since the epoch on the worker's node."""
        index = bisect_left(self._sizes, offset)
        return self._times[index] if index < len(self._times) else self._last
