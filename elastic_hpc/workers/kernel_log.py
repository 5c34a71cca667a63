"""What the kernel of this node logs while workers run, as far as this user may read the log."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_DEVICE = Path("/dev/kmsg")
_MOST = 2000
"""At most this many entries are read; later entries are never read."""
_LONGEST = 8192
"""Bytes; the kernel returns no longer entry."""


class KernelLog:
    """The entries since this object was made; none where the kernel's log is closed to users
    (``kernel.dmesg_restrict``) or hidden by a container.
    """

    def __init__(self, device: Path = _DEVICE) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def news(self) -> list[str]:
        """The texts of the entries since the last call, without their time and level."""
        if self._fd is None:
            return []
        read = b""
        for _ in range(_MOST):
            try:
                entry = os.read(self._fd, _LONGEST)
            except BrokenPipeError:  # the kernel has overwritten entries that were not read
                continue
            except OSError:
                break
            if not entry:
                break
            read += entry
        lines = read.decode(errors="replace").splitlines()
        return [text for line in lines if not line.startswith(" ") and (text := line.partition(";")[2])]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
