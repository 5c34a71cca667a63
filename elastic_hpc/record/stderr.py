"""The end of what a process has written to stderr."""

from __future__ import annotations

import contextlib
import os

from elastic_hpc.membership.tracebacks import READ


def tail(path: str | os.PathLike[str]) -> str:
    """The last 64 KiB of a file; empty if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - READ))
        return file.read(READ).decode(errors="replace")
    return ""
