"""The state directory of a cluster, and commands inside the cluster's machines."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mini_slurm import cgroups
from mini_slurm.system import CLEAN_ENV, MiniSlurmError, identity_of, run, say

USER = "minislurm"


@dataclass(frozen=True)
class Shape:
    """The cluster that the user requested from ``up``."""

    nodes: int
    cpus_per_node: int
    gpus_per_node: int
    shares: tuple[str, ...]
    """Directories that all machines see even if a parent directory is closed to others."""
    site: bool = False
    """Configured as sites do it: see the module site."""
    slurm: str = ""
    """The prefix of the Slurm installation; empty for the system's packages."""

    @property
    def names(self) -> list[str]:
        return [f"n{k}" for k in range(1, self.nodes + 1)]


class Cluster:
    """A cluster by its state directory, whether it is up or not."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.marker = state / "state.json"  # created first and removed last: marks the directory as ours
        self.conf = state / "etc/slurm/slurm.conf"
        self.home = state / "home"
        self.slurm_link = state / "slurm"  # to the prefix of the Slurm installation, if it is not the system's
        self.lock_fd = -1  # commands that outlive a crash of `up` inherit it, so that `down` waits for their end

    def saved(self) -> tuple[Shape, int] | None:
        """Shape and uid of the user; None if `up` never finished."""
        try:
            saved = json.loads(self.marker.read_text())
            return Shape(**{**saved["shape"], "shares": tuple(saved["shape"]["shares"])}), saved["uid"]
        except (FileNotFoundError, ValueError):
            return None

    @property
    def environment(self) -> dict[str, str]:
        """Environment of commands inside the machines: Slurm's commands are those of the cluster's own Slurm."""
        if not self.slurm_link.is_symlink():
            return CLEAN_ENV
        prefix = self.slurm_link.readlink()
        return {**CLEAN_ENV, "PATH": f"{prefix}/bin:{prefix}/sbin:{CLEAN_ENV['PATH']}"}

    def is_up(self) -> bool:
        return self.saved() is not None and self.init_of("rack") is not None and self.init_of("login") is not None

    def require_up(self) -> tuple[Shape, int]:
        saved = self.saved()
        if saved is None or not self.is_up():
            raise MiniSlurmError(f"no cluster is up in {self.state}: type  mini-slurm up")
        return saved

    def require_node(self, name: str, *, powered: bool = True) -> Shape:
        shape, _ = self.require_up()
        if name not in shape.names:
            raise MiniSlurmError(f"no node {name!r}: expected one of {' '.join(shape.names)}")
        if powered and self.init_of(name) is None:
            raise MiniSlurmError(f"{name} has no power: type  mini-slurm heal {name}")
        return shape

    def init_of(self, machine: str) -> int | None:
        """Host pid of the machine's init; None if the machine has no power."""
        try:
            record = (self.state / "machines" / machine).read_text()
            pid = int(record.split()[0])
            contained = os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
            return pid if contained and identity_of(pid) == record else None
        except (OSError, IndexError, ValueError):
            return None

    def power_off(self, machine: str) -> None:
        if (init := self.init_of(machine)) is None:
            return
        with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(init)) as handle:
            if self.init_of(machine) == init:  # otherwise the pid was reused before we had the handle
                signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)
                cgroups.thaw(self.state, "" if machine == "rack" else machine)
                if not select.select([handle], [], [], 30.0)[0]:
                    raise MiniSlurmError(f"{machine}: its init {init} is still there 30 s after SIGKILL")

    def ip(self, machine: str, *lines: str) -> None:
        """Run lines of `ip -batch` in the network namespace of a machine or of the rack."""
        net = f"--net=/proc/{self.init_of(machine)}/ns/net"
        run("nsenter", net, "ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    def ports(self) -> dict[str, bool]:
        """Whether each port of the rack's bridges (NODE-INTERFACE) is up."""
        net = f"--net=/proc/{self.init_of('rack')}/ns/net"
        return {link["ifname"]: "UP" in link["flags"] for link in json.loads(run("nsenter", net, "ip", "-j", "link"))}

    def inside(self, machine: str, *argv: str, check: bool = True) -> str:
        """Run a command as root in all namespaces of a machine."""
        if (init := self.init_of(machine)) is None:
            raise MiniSlurmError(f"machine {machine} is dead; the logs say:\n{self.log_tail()}")
        enter = ("nsenter", f"--target={init}", "-m", "-u", "-i", "-n", "-p", "-C", "--wd=/", "--")
        return run(*enter, *argv, check=check, env=self.environment)

    def slurm(self, *argv: str, check: bool = True) -> str:
        """Run a command of Slurm on the login machine; times in its output are epoch seconds."""
        return self.inside("login", "env", "SLURM_TIME_FORMAT=%s", f"SLURM_CONF={self.conf}", *argv, check=check)

    def log_tail(self) -> str:
        """The last lines of each log; only of logs with errors, if there are any."""
        texts = {path.name: path.read_text(errors="replace").splitlines() for path in self.state.glob("log/*.log")}
        errors = {name: [line for line in text if re.search("error|fatal", line)] for name, text in texts.items()}
        return "\n".join(f"  {name}: {line}" for name in sorted(texts) for line in (errors[name] or texts[name])[-6:])

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Allow one up, heal or down at a time. The parent directory is the lock file: nothing to remove later."""
        try:
            handle = os.open(self.state.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            raise MiniSlurmError(f"--state {self.state}: type  mkdir -p {self.state.parent}  first") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another mini-slurm to finish")
                fcntl.flock(handle, fcntl.LOCK_EX)
            self.lock_fd = handle
            yield
        finally:
            os.close(handle)
