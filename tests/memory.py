"""Memory cgroups of this machine, version 1 or 2, for tests of the kernel's out-of-memory killer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest


@dataclass(frozen=True)
class MemoryCgroup:
    folder: Path
    version: int

    @property
    def procs(self) -> Path:
        """A process whose id is written to this file joins the cgroup, with all its later children."""
        return self.folder / "cgroup.procs"

    def limit(self, size: int) -> None:
        """Limit the memory to ``size`` bytes."""
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.folder / name).write_text(str(size))

    @property
    def used(self) -> int:
        """The used memory in bytes."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.folder / name).read_text())


def _top() -> MemoryCgroup:
    """The root memory cgroup of the machine."""
    first = Path("/sys/fs/cgroup/memory")
    return MemoryCgroup(first, 1) if (first / "cgroup.procs").exists() else MemoryCgroup(first.parent, 2)


def memory_cgroup_of(pid: int) -> MemoryCgroup:
    """The memory cgroup of a process."""
    top, lines = _top(), Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    _, _, path = next(line.split(":", 2) for line in lines if ":memory:" in line or line.startswith("0::"))
    return replace(top, folder=top.folder / path.strip("/"))


@contextlib.contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """A new memory cgroup, which must be empty at the end. Skips the test if no cgroup can be made."""
    top = _top()
    made = replace(top, folder=top.folder / f"elastic_hpc_test_{os.getpid()}")
    try:
        if top.version == 2 and "memory" not in (top.folder / "cgroup.subtree_control").read_text():
            (top.folder / "cgroup.subtree_control").write_text("+memory")
        made.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        yield made
    finally:
        made.folder.rmdir()
