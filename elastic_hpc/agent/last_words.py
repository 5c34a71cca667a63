"""A file in memory by which the agent of the batch host passes the outcome of the job to the batch script. The run
directory may be full or read-only, and without a verdict the script would report a finished job as failed.
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
    """Write the file. The agent calls this when the leader has ended the job."""
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="elastic-hpc-end-", dir=memory_folder())
        with os.fdopen(descriptor, "w") as file:
            json.dump({"outcome": outcome, "reason": reason, "run": run}, file)
        os.replace(path, _path(job, run))


def take(job: str, run: int) -> dict[str, Any] | None:
    """Read and remove the file. The batch script calls this. Returns None if there is no such file of this user."""
    path = _path(job, run)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor) as file:
            if os.fstat(descriptor).st_uid != os.getuid():  # all users may write to the folder
                return None
            found: dict[str, Any] = json.load(file)
            path.unlink()
    except (OSError, ValueError):
        return None
    return found
