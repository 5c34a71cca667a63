"""What `up` needs from the machine: Slurm's packages and an unused uid."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import zlib
from pathlib import Path

from mini_slurm.cluster import Cluster
from mini_slurm.system import MiniSlurmError, run, say

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge", "ip": "iproute2"}
SITE_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
SITE_LIBRARIES = {
    "liblua5.3.so.0": "liblua5.3-0"
}  # loaded by Slurm's plugin job_submit/lua, so no package depends on it
SERVICES = {name: name for name in ("slurmctld", "slurmd", "munge", "slurmdbd")} | {"mariadb-server": "mariadb"}
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's way to keep an installation from starting services
POLICY_TEXT = "#!/bin/sh\n# Written by mini-slurm during an installation.\nexit 101\n"


def install_packages(cluster: Cluster, *, site: bool) -> None:
    commands = PACKAGES | (SITE_PACKAGES if site else {})
    needed = {pack for name, pack in commands.items() if shutil.which(name, path=cluster.environment["PATH"]) is None}
    if site:
        needed |= {pack for name, pack in SITE_LIBRARIES.items() if not any(Path("/usr/lib").glob(f"*/{name}"))}
    missing = sorted(needed)
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
        wait = ["-o", "DPkg::Lock::Timeout=300"]  # another installation may be running
        run("apt-get", "-q", *wait, "update", env=apt, pass_fds=keep)
        run("apt-get", "-q", *wait, "install", "-y", "--no-install-recommends", *missing, env=apt, pass_fds=keep)
        if shutil.which("systemctl") is not None:
            for package in SERVICES.keys() & set(missing):
                run("systemctl", "disable", SERVICES[package], check=False)
    finally:
        remove_policy()


def remove_policy() -> None:
    if POLICY.exists() and POLICY.read_text() == POLICY_TEXT:
        POLICY.unlink()


def free_uid(state: Path) -> int:
    """An unused uid, also unused as a gid; different state directories get different uids."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    return next(k for k in range(59000 + zlib.crc32(os.fsencode(state)) % 900, 60000) if k not in taken)
