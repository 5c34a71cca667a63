"""What `up` needs of the machine: Slurm's packages, and a uid that nobody has."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import zlib
from pathlib import Path

from mini_slurm.cluster import Cluster
from mini_slurm.system import CLEAN_ENV, MiniSlurmError, run, say

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge", "ip": "iproute2"}
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's way to say that an installation must not start services
POLICY_TEXT = "#!/bin/sh\n# Written by mini-slurm during an installation.\nexit 101\n"


def install_packages(cluster: Cluster) -> None:
    missing = sorted({pack for name, pack in PACKAGES.items() if shutil.which(name, path=CLEAN_ENV["PATH"]) is None})
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    if shutil.which("apt-get") is None:
        raise MiniSlurmError(f"no apt-get on this machine: install {' '.join(missing)} by other means first")
    apt = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if not POLICY.exists():
        POLICY.write_text(POLICY_TEXT)
        POLICY.chmod(0o755)
    try:
        keep = [cluster.lock_fd]
        run("apt-get", "-q", "update", env=apt, pass_fds=keep)
        run("apt-get", "-q", "install", "-y", "--no-install-recommends", *missing, env=apt, pass_fds=keep)
        if shutil.which("systemctl") is not None:
            for service in {"slurmctld", "slurmd", "munge"} & set(missing):
                run("systemctl", "disable", service, check=False)
    finally:
        remove_policy()


def remove_policy() -> None:
    if POLICY.exists() and POLICY.read_text() == POLICY_TEXT:
        POLICY.unlink()


def free_uid(state: Path) -> int:
    """A uid, and gid, that nobody has; another one for another state directory."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    return next(k for k in range(59000 + zlib.crc32(os.fsencode(state)) % 900, 60000) if k not in taken)
