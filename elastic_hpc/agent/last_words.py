"""How the job has ended, as the agent of the batch host tells the batch script: in a file in memory, because the run
directory may be full or read-only, and without a verdict the script would take a finished job for a failed one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from elastic_hpc.agent.promise_file import memory_folder


def _path(job: str, run: int) -> Path:
    return Path(memory_folder(), f"elastic-hpc-end.{os.getuid()}.{job}.{run}")


def leave(job: str, run: int, outcome: str, reason: str) -> None:
    """Called by the agent, once it is told that the job has ended."""
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="elastic-hpc-end-", dir=memory_folder())
        with os.fdopen(descriptor, "w") as file:
            json.dump({"outcome": outcome, "reason": reason, "run": run}, file)
        os.replace(path, _path(job, run))


def take(job: str, run: int) -> dict[str, Any] | None:
    """Called by the batch script: what its agent has left, which is removed; None if there is nothing."""
    path = _path(job, run)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor) as file:
            if os.fstat(descriptor).st_uid != os.getuid():  # anybody may write there
                return None
            found: dict[str, Any] = json.load(file)
            path.unlink()
    except (OSError, ValueError):
        return None
    return found
