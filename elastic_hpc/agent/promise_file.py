"""A file in memory in which a node's promises (``membership.promises``) outlive its agent: one for each node and run.

The agent opens, fills and locks the file when it starts. After that the control thread only overwrites bytes in place,
which never blocks. The file has two slots, and each write goes to the older slot: if the agent is killed while it
writes, the other slot is intact. The next agent of the node reads the file. A file that was written before a reboot is
ignored, because its last writes may be lost.

An agent that leaves with the job removes its file, and the files of agents of that run that died on this machine. A
file that remains, because the last agent of a node died, is removed by the next agent of the same user there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.promises import Promises

_PREFIX = "elastic-hpc-promises-"
_HEAD = struct.Struct("<QII")
"""The head of a slot: the number of the write, then length and checksum of the promises that follow."""
_FIRST_SLOT = 64
"""Offset of the first slot. The boot id of the machine precedes it."""
_SLOT, _SLOT_PER_NODE = 64 * 1024, 512
"""Bytes of a slot, and additional bytes for each node: a roster contains all addresses of its hosts."""


def memory_folder() -> str:
    """A folder in memory; the folder for temporary files if there is none."""
    shared = "/dev/shm"  # noqa: S108 - only files and folders of our own are used there, closed to others
    return shared if os.access(shared, os.W_OK) else tempfile.gettempdir()


@dataclass(frozen=True)
class PromisesKey:
    """Names the promises in a file: those of ``node`` in ``run`` of ``job``, whose run directory is ``run_dir``."""

    run_dir: Path
    job: str
    run: int
    node: int

    @property
    def of_run(self) -> str:
        """The prefix of the names of all files of the run."""
        run = hashlib.sha256(f"{self.run_dir}\0{self.job}\0{self.run}".encode()).hexdigest()[:16]
        return f"{_PREFIX}{run}."

    @property
    def prefix(self) -> str:
        return f"{self.of_run}{self.node}."


class PromiseFile:
    """The promises of one node. This process holds the lock of the file until it ends."""

    def __init__(self, path: str, descriptor: int) -> None:
        """Use the file ``path``, which is open and locked."""
        self._path, self._descriptor = path, descriptor
        self._slot = max(0, os.fstat(descriptor).st_size - _FIRST_SLOT) // 2
        self._number = 0

    def read(self) -> bytes | None:
        """The promises of the last complete write; None without one, or if the machine has rebooted since."""
        promises = None
        for slot in (0, 1) if os.pread(self._descriptor, _FIRST_SLOT, 0).rstrip(b"\0") == _boot_id() else ():
            raw = os.pread(self._descriptor, self._slot, _FIRST_SLOT + slot * self._slot)
            number, length, checksum = _HEAD.unpack_from(raw.ljust(_HEAD.size, b"\0"))
            found = raw[_HEAD.size : _HEAD.size + length]
            if number > self._number and zlib.crc32(found, number) == checksum:
                self._number, promises = number, found
        return promises

    def write(self, promises: bytes) -> None:
        """Write ``promises``. Raises OSError if they are too long."""
        self._number += 1
        record = _HEAD.pack(self._number, len(promises), zlib.crc32(promises, self._number)) + promises
        if len(record) > self._slot:
            raise OSError(f"{self._path}: {len(record)} bytes do not fit into {self._slot}")
        os.pwrite(self._descriptor, record, _FIRST_SLOT + self._number % 2 * self._slot)

    def close(self) -> None:
        """Leave the file to the next agent of this node."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file: no agent of this node follows in this run."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self.close()


def begin(place: PromisesKey, nodes: int, *, again: bool) -> tuple[Promises, PromiseFile | None]:
    """The promises of ``place``, and the file that keeps them. ``nodes``: the maximum number of nodes of the job.
    ``again``: this node had an agent before in this run; if its file is lost, the node no longer has a vote. Raises
    ElasticError while another agent of this node runs on this machine.
    """
    clean_up(place, ended=False)
    for path in _files(place.prefix):
        file = PromiseFile(path, _lock(path))
        kept = file.read() if again else None
        if kept is not None:
            return Promises(file.write, kept), file
        file.remove()
    if again:
        return Promises(votes=False), None
    file = _create(place, nodes)
    return Promises(file.write), file


def _create(place: PromisesKey, nodes: int) -> PromiseFile:
    descriptor, path = tempfile.mkstemp(prefix=place.prefix, dir=memory_folder())
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    slot = _SLOT + nodes * _SLOT_PER_NODE
    os.posix_fallocate(descriptor, 0, _FIRST_SLOT + 2 * slot)
    os.pwrite(descriptor, _boot_id(), 0)
    return PromiseFile(path, descriptor)


def clean_up(place: PromisesKey, *, ended: bool) -> None:
    """Remove files of this user whose agents are dead. If the run of ``place`` has ``ended``, these are the files of
    that run, else the files of all other runs. If another of these runs continues, and starts an agent here, that node
    has lost its vote.
    """
    for path in _files(_PREFIX):
        if os.path.basename(path).startswith(place.of_run) == ended:
            with contextlib.suppress(OSError, ElasticError):
                os.close(_lock(path))
                os.unlink(path)


def _files(prefix: str) -> list[str]:
    """Files of this user whose names begin with ``prefix``. Other users may have made files with such names."""
    with os.scandir(memory_folder()) as entries:
        named = [entry for entry in entries if entry.name.startswith(prefix) and entry.is_file(follow_symlinks=False)]
    return [entry.path for entry in named if _is_mine(entry)]


def _is_mine(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    return False


def _lock(path: str) -> int:
    """Open ``path``, and lock it until the descriptor is closed. Raises ElasticError while another agent uses it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ElasticError(f"{path}: another agent of this node runs already; expected one per node") from None
    return descriptor


def _boot_id() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
