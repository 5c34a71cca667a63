"""Whether the kernel's out-of-memory killer has struck: its counters tell."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class OomWatch:
    """Whether the kernel's out-of-memory killer took a process of this one's cgroup since the watch was made.

    Where the cgroup has no such counter, that of the whole machine is asked.
    """

    def __init__(self) -> None:
        self._before = _oom_kills()

    def happened(self) -> bool:
        return any(count > self._before.get(path, count) for path, count in _oom_kills().items())


def _oom_kills() -> dict[str, int]:
    """How many processes the kernel has killed for lack of memory, by the file that says so."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for folder, name in _cgroups():
            if (count := _count(folder / name)) is not None:
                found[str(folder / name)] = count
    if not found and (count := _count(Path("/proc/vmstat"))) is not None:
        found["/proc/vmstat"] = count
    return found


def _cgroups() -> list[tuple[Path, str]]:
    """Folder of this process's memory cgroup, version 1 or 2, and the file in it that has the counter."""
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
        while folder != top and not (folder / name).exists():  # a cgroup without the controller is its parent's
            folder = folder.parent
        found.append((folder, name))
    return found


def _count(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None
