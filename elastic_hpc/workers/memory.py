"""Memory of this node and of this process's cgroup: what is free, and whether the out-of-memory killer has struck."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LIMIT_AND_USE = {
    "memory.events": ("memory.max", "memory.current"),
    "memory.oom_control": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""The files with a cgroup's limit and usage, by the file with the killer's counter: version 2, version 1."""


class OomWatch:
    """Whether the kernel has killed a process of this cgroup for lack of memory since the watch was made.

    Where the cgroup has no counter of such kills, the counter of the whole machine counts.
    """

    def __init__(self) -> None:
        self._before = _oom_kills()

    def happened(self) -> bool:
        return any(count > self._before.get(path, count) for path, count in _oom_kills().items())


def available() -> float:
    """MiB that processes of this cgroup may still use; without a limit, MiB free on the machine."""
    free = (_number(Path("/proc/meminfo"), "MemAvailable:") or 0) * 1024
    with contextlib.suppress(OSError, ValueError):
        for folder, counters in _cgroups():
            limit, used = _LIMIT_AND_USE[counters]
            for group in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):  # no such group; or no limit, written as "max"
                    left = int((group / limit).read_text()) - int((group / used).read_text())
                    free = min(free, left + (_number(group / "memory.stat", "inactive_file") or 0))
    return free / 1024**2


def _oom_kills() -> dict[str, int]:
    """How many processes the kernel has killed for lack of memory, by the file with the counter."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for folder, name in _cgroups():
            if (count := _number(folder / name, "oom_kill")) is not None:
                found[str(folder / name)] = count
    if not found and (count := _number(Path("/proc/vmstat"), "oom_kill")) is not None:
        found["/proc/vmstat"] = count
    return found


def _cgroups() -> list[tuple[Path, str]]:
    """Folder of this process's memory cgroup, version 1 or 2, and the file in it with the killer's counter."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mountpoint = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2" and "" in own:
            path, name = own[""], "memory.events"
        elif kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            path, name = own["memory"], "memory.oom_control"
        else:
            continue
        top = Path(mountpoint)
        folder = top / os.path.relpath(path, root) if os.path.commonpath((path, root)) == root else top
        while folder != top and not (folder / name).exists():  # a cgroup without the controller belongs to its parent
            folder = folder.parent
        found.append((folder, name))
    return found


def _number(file: Path, name: str) -> int | None:
    """The number of ``name`` in a file with a name and a number on each line."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        return next(int(words[1]) for words in map(str.split, file.read_text().splitlines()) if words[0] == name)
    return None
