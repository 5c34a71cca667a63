"""One node of ``elastic-hpc doctor --run``: examines the node, talks to the others, writes a report.

Each node listens, publishes its addresses (``hello.NODE.json`` in the job's folder), connects to all other nodes, and
writes ``report.NODE.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hmac
import json
import os
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from elastic_hpc import __version__
from elastic_hpc.doctor.reports import FIRST_PORT, LAST_PORT, Dial, NodeReport, PeerReport
from elastic_hpc.errors import ElasticError
from elastic_hpc.network import addresses
from elastic_hpc.record.folders import look_again
from elastic_hpc.record.rundir import RunDir

# Seconds:
_TOTAL = 42.0  # for everything; the job has a minute
_HELLO_TIMEOUT = 20.0  # until all nodes must have published their addresses
_DIAL_TIMEOUT = 3.0
_FILE_TIMEOUT = 10.0  # until a file that another node makes must exist
_REPORT_TIMEOUT = 8.0  # until the others have written their reports too

_CLOCK_EXCHANGES = 8  # the fastest counts
_ADDRESSES = 3  # tried of each node


class _Server:
    """Answers the other nodes: sends the time, and makes a file with a lock, for which they then look."""

    def __init__(self, rundir: RunDir, node: str) -> None:
        self._rundir, self._node, self._secret = rundir, node, rundir.read_secret().decode()
        self._locked: list[Any] = []  # files, open to keep their locks
        range_socket = addresses.listen_from(FIRST_PORT, tries=LAST_PORT - FIRST_PORT + 1)
        any_socket = socket.create_server(("", 0), backlog=1024)
        self.port, self.any_port = range_socket.getsockname()[1], any_socket.getsockname()[1]
        for listening in (range_socket, any_socket):
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError), connection:
            connection.settimeout(_FILE_TIMEOUT + _DIAL_TIMEOUT)
            with connection.makefile("rwb") as stream:
                while line := stream.readline(4096):
                    received = time.time()
                    request = json.loads(line)
                    if not hmac.compare_digest(str(request["secret"]), self._secret):
                        return
                    made = self._make(str(request["mark"])) if "mark" in request else ""
                    answer = {"received": received, "made": made, "sent": time.time()}
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()

    def _make(self, peer: str) -> str:
        name = f"mark.{self._node}.{re.sub(r'[^A-Za-z0-9.-]', '_', peer)}"
        file = open(self._rundir.path / name, "w")  # noqa: SIM115 - held until the end
        self._locked.append(file)
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return name


def _talk(rundir: RunDir, node: str, name: str, hello: Mapping[str, Any]) -> PeerReport:
    """Connect to the node ``name`` at all addresses and ports, and measure over the first connection."""
    dials: list[Dial] = []
    measured: PeerReport | None = None
    for address in hello["addresses"][:_ADDRESSES]:
        for port, any_port in ((hello["port"], False), (hello["any_port"], True)):
            try:
                with socket.create_connection((address, port), timeout=_DIAL_TIMEOUT) as connection:
                    if measured is None:
                        measured = _measure(rundir, node, connection)
                dials.append(Dial(address, port, any_port))
            except (OSError, ValueError) as error:
                dials.append(Dial(address, port, any_port, _why(error)))
    return replace(measured or PeerReport(), resolves=_resolve(name), dials=tuple(dials))


def _measure(rundir: RunDir, node: str, connection: socket.socket) -> PeerReport:
    """The difference of the clocks, measured as in NTP, and the time until this node sees a file made on the other."""
    secret = rundir.read_secret().decode()
    connection.settimeout(_DIAL_TIMEOUT)
    with connection.makefile("rwb") as stream:

        def ask(**more: str) -> tuple[float, dict[str, Any], float]:
            before = time.time()
            stream.write(json.dumps({"secret": secret, **more}).encode() + b"\n")
            stream.flush()
            line = stream.readline(4096)
            return before, json.loads(line), time.time()

        best, ahead = float("inf"), 0.0
        for _ in range(_CLOCK_EXCHANGES):
            before, answer, after = ask()
            trip = after - before - (answer["sent"] - answer["received"])
            if trip < best:
                best, ahead = trip, (answer["received"] - before + answer["sent"] - after) / 2
        _, answer, _ = ask(mark=node)
        seen_after, lock_held = _look_for(rundir.path / str(answer["made"]))
    return PeerReport(ahead=ahead, seen_after=seen_after, lock_held=lock_held)


def _look_for(path: Path) -> tuple[float | None, bool | None]:
    """Seconds until ``path`` exists here, and whether the lock of another node on it is effective here."""
    begin = time.monotonic()
    while time.monotonic() < begin + _FILE_TIMEOUT:
        try:
            with open(path, "r+") as file:
                after = time.monotonic() - begin
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return after, True
                except OSError:
                    return after, None
                return after, False
        except OSError:
            time.sleep(0.02)
            with contextlib.suppress(OSError):
                look_again(path.parent)
    return None, None


def _why(error: Exception) -> str:
    return "timed out" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)


def _resolve(name: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(info[4][0]) for info in found))


def _create(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _bodies(rundir: RunDir, kind: str) -> dict[str, dict[str, Any]]:
    """The files ``kind.NODE.json`` so far, by node."""
    names = [path.name for path in rundir.path.glob(f"{kind}.*.json")]
    return {name[len(kind) + 1 : -5]: body for name in names if (body := rundir.read(name))}


def _wait(rundir: RunDir, kind: str, count: int, seconds: float) -> dict[str, dict[str, Any]]:
    end = time.monotonic() + seconds
    while len(found := _bodies(rundir, kind)) < count and time.monotonic() < end:
        time.sleep(0.1)
    return found


def probe(folder: Path, interface: str | None, environ: Mapping[str, str]) -> int:
    """Examine this node and the others, and write the report. Returns the exit code."""
    end = time.monotonic() + _TOTAL
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    count = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    if not folder.is_dir():
        raise ElasticError(f"{folder} is not there")
    rundir, problems = RunDir(folder), []
    try:
        published = addresses.to_publish(node, interface, environ.get("SLURM_LAUNCH_NODE_IPADDR"))
    except ElasticError as error:
        published = ()
        problems.append(str(error))
    server = _Server(rundir, node)
    created = _create(folder / "first")
    rundir.write(f"hello.{node}.json", {"addresses": published, "port": server.port, "any_port": server.any_port})
    others = {name: hello for name, hello in _wait(rundir, "hello", count, _HELLO_TIMEOUT).items() if name != node}
    peers = {name: PeerReport(error="no answer in time") for name in others}

    def talk(name: str) -> None:
        peers[name] = _talk(rundir, node, name, others[name])

    threads = [threading.Thread(target=talk, args=(name,), daemon=True) for name in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    torch = ""
    with contextlib.suppress(metadata.PackageNotFoundError):
        torch = metadata.version("torch")
    report = NodeReport(
        node=node,
        hostname=socket.gethostname(),
        python=platform.python_version(),
        torch=torch,
        elastic_hpc=__version__,
        interfaces=addresses.interface_addresses(),
        gpus_granted=environ.get("SLURM_GPUS_ON_NODE"),
        gpus_visible=environ.get("CUDA_VISIBLE_DEVICES"),
        gpu_devices=len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]),
        created=created,
        problems=tuple(problems),
        peers=dict(peers),
    )
    rundir.write(f"report.{node}.json", report.as_body())
    _wait(rundir, "report", len(others) + 1, _REPORT_TIMEOUT)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic_hpc.doctor.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--interface")
    args = parser.parse_args(argv)
    try:
        return probe(args.folder, args.interface, os.environ)
    except (ElasticError, OSError) as error:
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        print(f"probe of {name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads may hang in a name server or a file system
