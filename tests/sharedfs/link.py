"""The connection from a client to the server, with the server's current faults."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

from sharedfs import Behaviour

DYING = 0x4
"""PF_EXITING of a task's flags."""


class Link:
    """``control``: the file with the server's behaviour. A thread that calls ``reach`` or ``ask`` must hold no lock."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._behaviour, self._behaviour_of = Behaviour(), 0
        self._serving = threading.local()

    def serve(self, task: int) -> None:
        """From now on this thread sends requests on behalf of ``task``."""
        self._serving.task = task

    def behaviour(self) -> Behaviour:
        changed = self._control.stat().st_mtime_ns
        if changed != self._behaviour_of:
            self._behaviour, self._behaviour_of = Behaviour.read(self._control), changed
        return self._behaviour

    def reach(self) -> None:
        """Wait while the server is stopped. SIGKILL ends a waiting process, as it does for NFS."""
        while self.behaviour().stopped:
            if is_dying(self._serving.task):
                raise OSError(errno.EINTR, os.strerror(errno.EINTR))
            time.sleep(0.02)

    def ask(self) -> None:
        """Send a request about names or attributes to the server."""
        self.reach()
        time.sleep(self.behaviour().metadata_s)

    def check_quota(self, added: int = 1) -> None:
        """Raises OSError if the server refuses ``added`` more bytes or names."""
        if self.behaviour().over_quota and added > 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def is_dying(task: int) -> bool:
    """Whether the task has a pending SIGKILL, or already ends and closes its files."""
    try:
        status, flags = (Path(f"/proc/{task}/{name}").read_text() for name in ("status", "stat"))
    except OSError:
        return True
    pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigPnd"))
    return bool(pending >> (signal.SIGKILL - 1) & 1 or int(flags.rpartition(")")[2].split()[6]) & DYING)
