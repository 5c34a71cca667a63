"""System calls and processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CLEAN_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 29, 1 << 30
CLONE_NEWCGROUP = 1 << 25
MS_SAFE, MS_BIND, MS_REC, MS_PRIVATE = 2 | 4, 1 << 12, 1 << 14, 1 << 18  # SAFE: nosuid, nodev
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
LIBC = ctypes.CDLL(None, use_errno=True)


class MiniSlurmError(Exception):
    """An error in one line: what was found, what was expected, what to type."""


def say(text: str) -> None:
    print(f"mini-slurm: {text}", file=sys.stderr, flush=True)


def libc(function: str, *args: object) -> None:
    if getattr(LIBC, function)(*args) != 0:
        raise OSError(ctypes.get_errno(), f"{function}{args}: {os.strerror(ctypes.get_errno())}")


def mount(source: str | Path, target: str | Path, kind: str = "none", flags: int = 0, data: str = "") -> None:
    libc("mount", *map(os.fsencode, (source, target, kind)), ctypes.c_ulong(flags), os.fsencode(data))


def check_root(mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
    """Raises MiniSlurmError where machines cannot have their own mounts: in a chroot whose root is no mount point."""
    try:
        mounted = {line.split()[4] for line in mountinfo.read_text().splitlines()}
    except OSError:
        raise MiniSlurmError("/proc is not mounted here: type  mount -t proc proc /proc") from None
    if "/" not in mounted:
        raise MiniSlurmError(
            "this is a chroot whose / is no mount point, so machines cannot have mounts of their own: outside of it, "
            "type  mount --rbind DIR DIR  for its folder DIR, then chroot again; or use a container with --privileged"
        )
    if not os.path.isdir("/sys/fs/cgroup"):
        raise MiniSlurmError("/sys is not mounted here: type  mount -t sysfs sysfs /sys")


def run(
    *argv: str, check: bool = True, stdin: str = "", env: dict[str, str] = CLEAN_ENV, pass_fds: Sequence[int] = ()
) -> str:
    """Standard output of a command. Raises MiniSlurmError with the command's output if it fails."""
    done = subprocess.run(argv, input=stdin, env=env, text=True, capture_output=True, check=False, pass_fds=pass_fds)
    if check and done.returncode != 0:
        tail = (done.stderr or done.stdout).strip()[-2000:]
        raise MiniSlurmError(f"{' '.join(argv)} failed with exit code {done.returncode}: {tail}")
    return done.stdout


def identity_of(process: str | int) -> str:
    """Uniquely identifies a process: pid, start in ticks since boot, boot id."""
    start = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{process} {start} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
