"""Control groups of a site's machines: each machine sees a tree of its own, as a real computer does.

Slurm makes its groups below the root that slurmd sees. Several machines, and several clusters, share one kernel here,
so the root of a machine is ``/mini-slurm-HASH/MACHINE`` of each controller, which a cgroup namespace shows as ``/``.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from pathlib import Path

from mini_slurm.system import CLONE_NEWCGROUP, MS_BIND, MS_REC, MiniSlurmError, libc, mount

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpuset", "memory", "devices", "freezer", "cpuacct")  # of Slurm's plugins for cgroup v1
DEADLINE_S = 10.0


def usable() -> bool:
    """Whether this machine has cgroup v1 with all controllers that Slurm needs, writable."""
    return all(os.access(ROOT / name / "cgroup.procs", os.W_OK) for name in CONTROLLERS)


def trees(state: Path, machine: str = "") -> list[Path]:
    """The groups of the cluster or of one machine, one per controller, whether they exist or not."""
    return [ROOT / name / f"mini-slurm-{zlib.crc32(os.fsencode(state)):08x}" / machine for name in CONTROLLERS]


def enter(state: Path, machine: str) -> None:
    """Move the calling process, the machine's init, into new groups, which become the roots in its mount namespace."""
    remove(state, machine)
    for tree, name in zip(trees(state, machine), CONTROLLERS, strict=True):
        for group in (tree.parent, tree):
            group.mkdir(exist_ok=True)
            if name == "cpuset":  # a new cpuset has no CPUs, and no process can join it then
                for what in ("cpuset.cpus", "cpuset.mems"):
                    (group / what).write_text((group.parent / what).read_text())
        (tree / "cgroup.procs").write_text("0")
    libc("unshare", CLONE_NEWCGROUP)
    for tree, name in zip(trees(state, machine), CONTROLLERS, strict=True):
        mount(tree, ROOT / name, flags=MS_BIND | MS_REC)


def joining(state: Path, machine: str) -> list[str]:
    """The start of a command line; the rest of the line then runs in the groups of the machine."""
    if not all(tree.is_dir() for tree in trees(state, machine)):
        return []
    joins = [f"echo $$ >{ROOT / name}/cgroup.procs" for name in CONTROLLERS]
    return ["sh", "-ec", "; ".join([*joins, 'exec "$@"']), "sh"]


def thaw(state: Path, machine: str) -> None:
    """Thaw processes that Slurm has frozen, so that SIGKILL ends them."""
    tree = trees(state, machine)[CONTROLLERS.index("freezer")]
    for file in tree.rglob("freezer.state"):
        with contextlib.suppress(OSError):
            file.write_text("THAWED")


def remove(state: Path, machine: str = "") -> None:
    """Remove the groups of the cluster or of one machine, after their processes were killed."""
    deadline = time.monotonic() + DEADLINE_S
    for tree in trees(state, machine):
        while tree.is_dir():
            for group, _, _ in os.walk(tree, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(group)
            if tree.is_dir():
                if time.monotonic() > deadline:
                    raise MiniSlurmError(f"{tree}: still in use {DEADLINE_S:.0f} s after its processes were killed")
                time.sleep(0.05)
