"""The way from a client to the server, with the faults that the server has just now."""

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
    """``control``: the file that says how the server behaves. No lock may be held by who calls ``reach`` or ``ask``."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._behaviour, self._behaviour_of = Behaviour(), 0
        self._serving = threading.local()

    def serve(self, task: int) -> None:
        """What this thread asks for from now on, it asks for ``task``."""
        self._serving.task = task

    def behaviour(self) -> Behaviour:
        changed = self._control.stat().st_mtime_ns
        if changed != self._behaviour_of:
            self._behaviour, self._behaviour_of = Behaviour.read(self._control), changed
        return self._behaviour

    def reach(self) -> None:
        """Wait while the server has stopped. Of whoever waits, SIGKILL ends it, as it does for NFS."""
        while self.behaviour().stopped:
            if is_dying(self._serving.task):
                raise OSError(errno.EINTR, os.strerror(errno.EINTR))
            time.sleep(0.02)

    def ask(self) -> None:
        """A question to the server about names or attributes."""
        self.reach()
        time.sleep(self.behaviour().metadata_s)

    def check_quota(self, added: int = 1) -> None:
        """Raises OSError if the server does not take ``added`` bytes or names more."""
        if self.behaviour().over_quota and added > 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def is_dying(task: int) -> bool:
    """Whether SIGKILL ends this task, or it ends already and closes its files."""
    try:
        status, flags = (Path(f"/proc/{task}/{name}").read_text() for name in ("status", "stat"))
    except OSError:
        return True
    pending = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigPnd"))
    return bool(pending >> (signal.SIGKILL - 1) & 1 or int(flags.rpartition(")")[2].split()[6]) & DYING)
