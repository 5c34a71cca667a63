"""Memory cgroups of this machine, version 1 or 2, for tests of what the kernel's out-of-memory killer does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class MemoryCgroup:
    folder: Path
    _version: int

    @property
    def procs(self) -> Path:
        """Write a process id into it, and that process is in the cgroup, with the children that it will have."""
        return self.folder / "cgroup.procs"

    def limit(self, size: int) -> None:
        """In bytes."""
        name = "memory.limit_in_bytes" if self._version == 1 else "memory.max"
        (self.folder / name).write_text(str(size))

    @property
    def used(self) -> int:
        """In bytes."""
        name = "memory.usage_in_bytes" if self._version == 1 else "memory.current"
        return int((self.folder / name).read_text())


@contextlib.contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """A new one, which must be empty at the end. The test is skipped where none can be made."""
    top, version = Path("/sys/fs/cgroup/memory"), 1
    if not (top / "cgroup.procs").exists():
        top, version = Path("/sys/fs/cgroup"), 2
    made = MemoryCgroup(top / f"elastic_hpc_test_{os.getpid()}", version)
    try:
        if version == 2 and "memory" not in (top / "cgroup.subtree_control").read_text():
            (top / "cgroup.subtree_control").write_text("+memory")
        made.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        yield made
    finally:
        made.folder.rmdir()
