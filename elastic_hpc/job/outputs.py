"""The files of ``--output`` and ``--error``. Slurm does not make their folders: if a folder is missing, the job fails
without a message, and its batch script never runs. Writes files.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
from collections.abc import Sequence

from elastic_hpc.options.sbatch import Given, last


def make_folders(sbatch: Sequence[Given], work_dir: str) -> None:
    """Make the folders that are known before the job has an id, if this machine can."""
    for _, folder, _ in _folders(sbatch, work_dir):
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)


def notes(sbatch: Sequence[Given], work_dir: str) -> list[str]:
    """A line for each folder that is not known, or cannot be made here: the job may fail because of it."""
    found = []
    for given, folder, rest in _folders(sbatch, work_dir):
        if rest:
            found.append(f"{given}: Slurm makes no folders; the job fails if {rest!r} is not there when it starts")
        elif problem := _obstacle(folder):
            found.append(
                f"{given}: {folder} cannot be written here: {problem}; if the nodes cannot either, the job fails"
            )
    return found


def _folders(sbatch: Sequence[Given], work_dir: str) -> list[tuple[Given, str, str]]:
    """Each option, the known beginning of its folder, and the whole folder if a part of it is unknown, else empty."""
    known = {"%x": last(sbatch, "job-name") or "%x", "%%": "%", "%u": _user()}
    found = []
    for name in "output", "error":
        given = next((option for option in reversed(sbatch) if option.name == name), None)
        path = os.path.dirname(given.value or "") if given else ""
        if given is None or not path:
            continue
        folder = rest = ""
        pieces = [path.replace("\\", "")] if "\\" in path else re.split(r"(%\d*[A-Za-z%])", path)
        for piece in pieces:  # in a path with a backslash, no % has a meaning
            if len(pieces) > 1 and piece[:1] == "%" and piece not in known:
                rest, folder = path, folder[: folder.rfind("/") + 1]
                break
            folder += known.get(piece, piece)
        found.append((given, os.path.join(work_dir, folder), rest))
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "%u"


def _obstacle(folder: str) -> str:
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        return f"{folder} is a file"
    return "" if os.access(folder, os.W_OK) else "Permission denied"
