"""The network addresses of this node, the addresses that other nodes should dial, and free ports."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import ipaddress
import resource
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from elastic_hpc.errors import ElasticError

BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel has a bound of its own, net.core.somaxconn."""

LOOPBACK = "127.0.0.1"

_OTHER_FILES = 512
"""Files that this process may have open besides its connections."""

_SIOCGIFCONF, _SIOCGIFFLAGS = 0x8912, 0x8913  # linux/sockios.h
_UP_AND_RUNNING = 0x1 | 0x40  # IFF_UP, IFF_RUNNING
_SYSTEM = "/sys/class/net"
_ENTRY = 40 if struct.calcsize("P") == 8 else 32
"""Bytes of an entry of SIOCGIFCONF: 16 for the name, then a socket address."""


def interface_addresses() -> dict[str, str]:
    """The first IPv4 address of each interface, by the name of the interface."""
    found: dict[str, str] = {}
    for name, address in _own():
        found.setdefault(name, address)
    return found


def of_workers(named: str) -> str:
    """The address of the interface that is ``named`` for the workers, as NCCL reads it: a prefix, or several, or an
    exact name after an equals sign. Empty if no interface matches, or if ``named`` only excludes interfaces, with
    ``^``.
    """
    first = named.partition(",")[0]
    for name, address in interface_addresses().items() if first else ():
        if name == first[1:] if first.startswith("=") else name.startswith(first):
            return address
    return ""


def interface_of(address: str) -> str | None:
    """The name of the interface that has ``address``."""
    return next((name for name, own in _own() if own == address), None)


def _own() -> list[tuple[str, str]]:
    """All IPv4 addresses of this node, each with the name of its interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        room = 64 * _ENTRY
        while True:
            answer = array.array("B", bytes(room))
            request = struct.pack("iP", room, answer.buffer_info()[0])
            used: int = struct.unpack("iP", fcntl.ioctl(probe, _SIOCGIFCONF, request))[0]
            if used < room:
                break
            room *= 2
    entries = [answer[at : at + _ENTRY].tobytes() for at in range(0, used, _ENTRY)]
    return [(entry[:16].rstrip(b"\0").decode(), socket.inet_ntoa(entry[20:24])) for entry in entries]


def to_publish(node: str, interface: str | None, submit_host: str | None) -> tuple[str, ...]:
    """Addresses under which other nodes may reach this node, the best first.

    The address of ``interface`` if that is given (``--interface``). Else the addresses to which ``node``, Slurm's name
    of this node, resolves, then the address that the route to ``submit_host`` uses, then the addresses of all other
    interfaces that lead out of this node. A bridge of containers or virtual machines has the same address on every node
    and leads to none of them; neither does loopback, a link-local address, or an interface that is down. If there are
    only such addresses, all but loopback are returned. Raises ElasticError if there is none.
    """
    if interface is not None:
        first = interface_addresses()
        if interface not in first:
            raise ElasticError(
                f"--interface {interface!r}: {node} has no such interface with an address, "
                f"expected one of {', '.join(sorted(first))}"
            )
        return (first[interface],)
    own = [(name, address) for name, address in _own() if not address.startswith("127.")]
    name_of = {address: name for name, address in own}
    named = [address for address in (*resolve(node), *_route_to(submit_host)) if address in name_of]
    firsts = [address for name, address in interface_addresses().items() if address in name_of]
    sound = {address for name, address in own if _is_sound(name, address)}
    best = [address for address in named if address in sound]
    known = {name_of[address] for address in best}
    best += [a for a in firsts if a in sound and name_of[a] not in known and _leads_out(name_of[a])]
    usable = best or [a for a in firsts if a in sound] or [*named, *firsts]
    if not usable:
        raise ElasticError(f"{node} has no network address but loopback; name the interface to use: --interface IFNAME")
    return tuple(dict.fromkeys(usable))


def _is_sound(interface: str, address: str) -> bool:
    """Whether packets for ``address`` may arrive from other nodes at all."""
    is_bridge = Path(_SYSTEM, interface, "bridge").exists()
    if ipaddress.ip_address(address).is_link_local or (is_bridge and not _is_upon_a_device(interface)):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe, _SIOCGIFFLAGS, struct.pack("256s", interface.encode()))
        flags: int = struct.unpack_from("H", answer, 16)[0]
        return flags & _UP_AND_RUNNING == _UP_AND_RUNNING
    return True


def _leads_out(interface: str) -> bool:
    """Whether ``interface`` is a device, or is linked to another interface: it lies on top of that, like a bond or a
    VLAN, or is the inner end of a container's link. A tunnel, a tap or a dummy is neither. True if the system does not
    say.
    """
    try:
        index, linked = (Path(_SYSTEM, interface, name).read_text() for name in ("ifindex", "iflink"))
    except OSError:
        return True
    return index != linked or _is_upon_a_device(interface)


def _is_upon_a_device(interface: str) -> bool:
    folder = Path(_SYSTEM, interface)
    lower = (path.name.partition("_")[2] for path in folder.glob("lower_*"))
    return (folder / "device").exists() or any(map(_is_upon_a_device, lower))


def nearest(hosts: Sequence[str], to: str) -> str:
    """The address in ``hosts`` that is most probably on the network of the address ``to``: it has the longest prefix in
    common with ``to``.
    """
    number = int(ipaddress.ip_address(to))
    return min(hosts, key=lambda host: (number ^ int(ipaddress.ip_address(host))).bit_length())


def is_me(host: str, node: str) -> bool:
    """Whether ``host`` (a name or an address) is this node, which Slurm calls ``node``. Several nodes may have the same
    address.
    """
    names = {node, node.partition(".")[0], socket.gethostname()}
    own = {address for _, address in _own()}
    return host in names or any(address in own or address.startswith("127.") for address in resolve(host))


def resolve(name: str) -> list[str]:
    """The IPv4 addresses of ``name``; none if it is unknown."""
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)]
    except OSError:
        return []


def _route_to(host: str | None) -> list[str]:
    if not host:
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing, asks the kernel for the route
        except OSError:
            return []
        return [str(probe.getsockname()[0])]


def allow_connections(count: int) -> None:
    """Raise the limit of this process to ``count`` connections besides its files, as far as its hard limit allows. Many
    systems begin with 1024 for both. Workers that are started later inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(count + _OTHER_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen_from(port: int, host: str = "", tries: int = 512) -> socket.socket:
    """A socket that listens on ``host``, by default on all interfaces, on the first free port from ``port`` upwards."""
    return listen_on([host], port, tries)[0]


def listen_on(hosts: Sequence[str], port: int, tries: int = 512) -> list[socket.socket]:
    """A socket for each of ``hosts``, all on one port: the first from ``port`` upwards that is free on all of them.
    Raises ElasticError.
    """
    problem: OSError | None = None
    for candidate in range(port, min(port + tries, 65536)):
        try:
            return _listen(hosts, candidate)
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRNOTAVAIL:
                raise ElasticError(f"{' or '.join(hosts)} is no longer an address of this node: {error}") from error
    raise ElasticError(f"no free port from {port} upwards ({problem}); choose another: --rdzv-endpoint :PORT")


def _listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    with contextlib.ExitStack() as sockets:
        made = []
        for host in hosts:
            made.append(sockets.enter_context(socket.create_server((host, port), backlog=BACKLOG, reuse_port=False)))
            port = made[0].getsockname()[1]
        sockets.pop_all()
        return made


def own(hosts: Sequence[str]) -> list[str]:
    """Which of ``hosts`` are addresses of this node."""
    here = {address for _, address in _own()}
    return [host for host in hosts if host in here or host.startswith("127.")]
