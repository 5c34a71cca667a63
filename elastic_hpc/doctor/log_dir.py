"""Whether all nodes see the folder of the run directories, as far as this machine knows. Reads /proc."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from elastic_hpc.doctor.findings import Finding, Level

_SHARED = frozenset(
    "nfs nfs4 lustre gpfs beegfs ceph cifs smb3 afs panfs wekafs orangefs pvfs2 gfs2 ocfs2 glusterfs daos".split()  # noqa: SIM905
)
_OF_ONE_MACHINE = frozenset({"tmpfs", "ramfs", "devtmpfs"})


def file_system(mountinfo: str, path: str) -> tuple[str, str]:
    """Type and mount point of the file system of the absolute ``path``, according to /proc/self/mountinfo."""
    best = ("", "")
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount.split()[4])
        if PurePath(path).is_relative_to(point) and len(point) >= len(best[1]):  # a later mount hides an earlier one
            best = (source.split()[0], point)
    return best


def check(path: str) -> Finding:
    """The finding on the folder ``path``, which need not exist yet."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError as error:
        return Finding(Level.UNKNOWN, "log-dir", f"/proc/self/mountinfo: {error.strerror}", "not judged", "you: --run")
    return log_dir_finding(mounts, os.path.realpath(path))


def log_dir_finding(mountinfo: str, path: str) -> Finding:
    """The finding on the absolute ``path``, according to /proc/self/mountinfo."""
    kind, point = file_system(mountinfo, path)
    found = f"{path} is on {point or 'an unknown mount'} ({kind or 'unknown'})"
    choose = "you: --log-dir DIR, on a file system that all nodes share"
    if kind in _OF_ONE_MACHINE:
        return Finding(Level.BAD, "log-dir", found, "this folder is in this machine's memory: no node sees it", choose)
    if kind in _SHARED or kind.startswith("fuse."):
        return Finding(Level.OK, "log-dir", found, "a network file system; --run checks whether all nodes see it")
    if any(PurePath(path).is_relative_to(folder) for folder in ("/tmp", "/var/tmp")):  # noqa: S108
        return Finding(Level.WARN, "log-dir", found, "each machine has its own folder of this name", choose)
    means = "other machines may not see this file system"
    return Finding(Level.UNKNOWN, "log-dir", found, means, "you: elastic-hpc doctor --run checks this on the nodes")
