"""What workers that give no sign of life do: they compute, read or write, they wait for a device, or they are idle, for
example in a collective without a peer. Reads ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from elastic_hpc.workers import proc

Doing = Literal["busy", "blocked", "idle"]

_CORES = 0.2
"""This share of a core shows that a worker computes. Threads that wait, and monitors of the site, take less."""

_BYTES = 2**20
"""This many bytes, in files and pipes, between two looks show that a worker reads or writes."""

_TICKS = os.sysconf("SC_CLK_TCK")


class Work:
    """What the workers ``pids`` of one node do, together with all their descendants."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._before: dict[int, tuple[int, int]] = {}
        """For each process: CPU time in clock ticks, and bytes read and written."""

    def look(self, seconds: float) -> Doing:
        """What the workers have done in the ``seconds`` since the last look. ``blocked``: a thread waits in the kernel
        for a device, such as a disk, a file server or a GPU. The first look finds no work yet.
        """
        trees = proc.trees_of(self._pids)
        everything = {pid for tree in trees for pid in tree}
        known = self._before
        self._before = {pid: (proc.cpu_ticks(pid), _transferred(pid)) for pid in everything}
        if any(proc.waits_for_device(pid) for pid in everything):
            return "blocked"
        if not known:
            return "idle"
        for tree in trees:
            done = [(self._before[pid], known.get(pid, (0, 0))) for pid in tree]
            ticks = sum(now[0] - then[0] for now, then in done)
            transferred = sum(now[1] - then[1] for now, then in done)
            much = ticks > _CORES * _TICKS * seconds or transferred > _BYTES
            if much or any(map(proc.wants_cpu, tree)):  # a worker may get little of a CPU that many share
                return "busy"
        return "idle"


def _transferred(pid: int) -> int:
    """Bytes that the process has read and written; 0 if the kernel does not say."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
    return 0
