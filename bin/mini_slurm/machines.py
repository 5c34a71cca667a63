"""A machine of the cluster: an init in namespaces of its own, with mounts, and interfaces on the rack's bridges."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mini_slurm import cgroups
from mini_slurm.cluster import Cluster, Shape
from mini_slurm.system import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    MS_SAFE,
    PR_SET_NAME,
    MiniSlurmError,
    identity_of,
    libc,
    mount,
)

NETWORKS = {"eth0": 213, "ib0": 214}  # interface (its bridge has the same name): second byte of 10.x.0.0/24


def start_rack(cluster: Cluster) -> None:
    """Start the init of all inits, whose network namespace has the bridges."""
    boot(cluster, "rack", CLONE_NEWNET, lambda: None)
    cluster.ip("rack", *(f"link add {bridge} up type bridge" for bridge in NETWORKS))


def start_machine(cluster: Cluster, shape: Shape, machine: str) -> None:
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET
    boot(cluster, machine, namespaces, lambda: furnish(cluster, shape, machine))
    k, ports = host_number(machine), cluster.ports()
    for interface, byte in NETWORKS.items():
        port = f"{machine}-{interface}"
        cluster.ip(
            "rack",
            *([f"link del {port}"] if port in ports else []),  # left from before the machine lost its power
            f"link add {port} type veth peer name {interface} netns {cluster.init_of(machine)}",
            f"link set {port} master {interface} up",
        )
        cluster.ip(
            machine,
            f"address add {address(machine, interface)}/24 dev {interface}",
            f"link set {interface} address 02:00:00:00:{byte:02x}:{k:02x} up",  # the same address after a heal
        )
    cluster.ip(machine, "link set lo up")


def set_links(cluster: Cluster, machine: str, state: Literal["up", "down"]) -> None:
    """Connect a machine to the bridges, or disconnect it, at the rack's end of its links."""
    cluster.ip("rack", *(f"link set {machine}-{interface} {state}" for interface in NETWORKS))


def has_links(machine: str, ports: dict[str, bool]) -> bool:
    return all(ports.get(f"{machine}-{interface}", False) for interface in NETWORKS)


def boot(cluster: Cluster, machine: str, flags: int, setup: Callable[[], None]) -> None:
    """Start an init in new namespaces, inside those of the rack if it exists. Returns when the init has run `setup`."""
    rack = cluster.init_of("rack")
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if rack is not None:
                libc("setns", os.open(f"/proc/{rack}/ns/pid", os.O_RDONLY), CLONE_NEWPID)
                if os.fork():
                    os._exit(0)
            os.setsid()
            libc("unshare", flags | CLONE_NEWPID)
            if os.fork():
                os._exit(0)
            # /proc is still the outer one here, so it knows this process by its outer pid.
            record = cluster.state / "machines" / machine
            record.write_text(identity_of(os.readlink("/proc/self")))
            os.chdir("/")
            for standard in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), standard)
            writable = os.dup2(writable, 3)
            os.closerange(4, 65536)
            libc("prctl", PR_SET_NAME, f"mini-{machine}".encode(), 0, 0, 0)
            setup()
            os.write(writable, b"ready")
            os.close(writable)
            be_init(record)
        except BaseException as error:  # noqa: BLE001 - a forked child never returns into the caller's code
            os.write(writable, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)
    os.close(writable)
    os.waitpid(child, 0)
    with open(readable, encoding="utf-8") as file:
        if (answer := file.read()) != "ready":
            raise MiniSlurmError(f"machine {machine} did not start: {answer or 'its init died'}")


def be_init(record: Path) -> None:
    """Reap orphans until killed, or until the state directory was removed by hand."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while record.exists():
        signal.sigtimedwait({signal.SIGCHLD}, 2.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def furnish(cluster: Cluster, shape: Shape, machine: str) -> None:
    """Set up the new namespaces of a machine; its init runs this before any other process enters them."""
    socket.sethostname(machine)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_SAFE)
    cgroup = os.open("/sys/fs/cgroup", os.O_PATH)
    mount("sysfs", "/sys", "sysfs", MS_SAFE)  # a new mount shows the machine's own interfaces
    mount(f"/proc/self/fd/{cgroup}", "/sys/fs/cgroup", flags=MS_BIND | MS_REC)
    if shape.site and cgroups.usable():
        cgroups.enter(cluster.state, machine)
    mount("tmpfs", "/dev/shm", "tmpfs", MS_SAFE, "mode=1777")  # noqa: S108 - a mount point
    mount(cluster.state / "etc", "/etc", flags=MS_BIND)
    mount(cluster.state / "munge" / machine, cluster.state / "run/munge", flags=MS_BIND)
    # Let all users reach the shares: an open, empty directory replaces a closed directory above a share.
    closed = {
        share: next((above for above in reversed(Path(share).parents) if not above.stat().st_mode & 0o001), None)
        for share in sorted({str(cluster.state), *shape.shares, *filter(None, [shape.slurm])})
    }
    handles = {share: os.open(share, os.O_PATH) for share, above in closed.items() if above is not None}
    for above in sorted({above for above in closed.values() if above is not None}):
        mount("tmpfs", above, "tmpfs", MS_SAFE, "mode=0755")
    for share, handle in handles.items():
        os.makedirs(share, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", share, flags=MS_BIND | MS_REC)


def address(machine: str, interface: str) -> str:
    return f"10.{NETWORKS[interface]}.0.{host_number(machine)}"


def host_number(machine: str) -> int:
    return 254 if machine == "login" else int(machine[1:])
