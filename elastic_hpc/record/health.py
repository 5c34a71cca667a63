"""Folders with a file for each node that the job must not use: ``segment_health_check.NODE``. Reads and writes files.

The format is that of the segment health check of NVIDIA's resiliency extension, which has a file for each allocation: a
file that is not empty marks the node, and says why. The site's own daemon writes such files (``--health-dir``), and so
does ``elastic-hpc notice``, in the run directory.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from elastic_hpc.record.folders import look_again, replace

_FILE = "segment_health_check."
_NO_REASON = "its health file says no more"
_MOST = 200
"""At most this many characters of a reason are read."""


def marked(folder: Path, since: float = 0.0) -> dict[str, str]:
    """The nodes that are marked in ``folder``, by name: why. Marks from before ``since``, seconds since the epoch, do
    not count. Raises OSError if the folder cannot be read.
    """
    look_again(folder)
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # withdrawn this moment
                if not (entry.name.startswith(_FILE) and entry.is_file()):
                    continue
                if entry.stat().st_size and entry.stat().st_mtime >= since:
                    found[entry.name.removeprefix(_FILE)] = _first_line(entry.path)
    return found


def _first_line(path: str) -> str:
    """The readable part of the line: the site may make the content unreadable."""
    with contextlib.suppress(PermissionError), open(path, errors="replace") as file:
        line = file.readline(_MOST).strip()
        line = "".join(char if char.isprintable() else " " for char in line)
        return line or _NO_REASON
    return _NO_REASON


def mark(folder: Path, node: str, reason: str) -> None:
    """Mark ``node``: a reader sees all of the reason or nothing. Raises OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    replace(folder / f"{_FILE}{node}", f"{reason}\n")


def unmark(folder: Path, node: str) -> bool:
    """Withdraw the mark of ``node``. Returns whether there was one. Raises OSError."""
    try:
        (folder / f"{_FILE}{node}").unlink()
    except FileNotFoundError:
        return False
    return True
