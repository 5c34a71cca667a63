"""The network addresses of this node, the addresses that other nodes should dial, and free ports."""

from __future__ import annotations

import fcntl
import resource
import socket
import struct

from elastic_hpc.errors import ElasticError

BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel has a bound of its own, net.core.somaxconn."""

_OTHER_FILES = 512
"""Files that this process may have open besides its connections."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_addresses() -> dict[str, str]:
    """The IPv4 addresses of the interfaces, by the name of the interface."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_of(address: str) -> str | None:
    """The name of the interface that has ``address``."""
    return next((name for name, own in interface_addresses().items() if own == address), None)


def to_publish(node: str, interface: str | None, submit_host: str | None) -> tuple[str, ...]:
    """Addresses under which other nodes may reach this node, the best first.

    The address of ``interface`` if that is given (``--interface``). Else the addresses to which ``node``, Slurm's name
    of this node, resolves, then the address that the route to ``submit_host`` uses, then all others. Never loopback.
    Raises ElasticError if there is none.
    """
    own = interface_addresses()
    if interface is not None:
        if interface not in own:
            raise ElasticError(
                f"--interface {interface!r}: {node} has no such interface with an address, "
                f"expected one of {', '.join(sorted(own))}"
            )
        return (own[interface],)
    candidates = [*_resolve(node), *_route_to(submit_host), *own.values()]
    usable = [a for a in dict.fromkeys(candidates) if a in own.values() and not a.startswith("127.")]
    if not usable:
        raise ElasticError(f"{node} has no network address but loopback; name the interface to use: --interface IFNAME")
    return tuple(usable)


def is_me(host: str, node: str) -> bool:
    """Whether ``host`` (a name or an address) is this node, which Slurm calls ``node``."""
    names = {node, node.partition(".")[0], socket.gethostname()}
    return host in names or any(address in interface_addresses().values() for address in _resolve(host))


def _resolve(name: str) -> list[str]:
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


def listen_from(port: int, tries: int = 512) -> socket.socket:
    """A socket that listens on all interfaces, on the first free port from ``port`` upwards."""
    problem: OSError | None = None
    for candidate in range(port, min(port + tries, 65536)):
        try:
            return socket.create_server(("", candidate), backlog=BACKLOG, reuse_port=False)
        except OSError as error:
            problem = error
    raise ElasticError(f"no free port from {port} upwards ({problem}); choose another: --rdzv-endpoint :PORT")
