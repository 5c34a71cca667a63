"""Where a node's promises outlive its agent: a file in memory, which belongs to one node of one run of a job.

The file is opened, filled and locked at the start; after that the control thread only writes bytes in place, which
waits for nothing. It has two slots, and each write goes to the older one, so an agent that is killed while it writes
leaves the other one whole. The next agent of the node reads it (``membership.promises``). A file from before a reboot,
which may have lost the last writes, counts as none.

Who ends with the job removes its file, and those of agents that died on the same machine. What is left then, on nodes
where the last agent died, is removed by the next agent of the same user there.
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
"""At the start of a slot: the number of the write, and length and checksum of what follows."""
_FIRST_SLOT = 64
"""Where the first slot begins, behind the boot id of the machine."""
_SLOT, _SLOT_PER_NODE = 64 * 1024, 512
"""Bytes of a slot, and bytes for each node: a roster names hosts with all their addresses."""


def memory_folder() -> str:
    """A folder in memory, if there is one."""
    shared = "/dev/shm"  # noqa: S108 - only files and folders of our own are used there, closed to others
    return shared if os.access(shared, os.W_OK) else tempfile.gettempdir()


@dataclass(frozen=True)
class Place:
    """Whose promises a file has: those of ``node`` in ``run`` of ``job``, which has the run directory ``run_dir``."""

    run_dir: Path
    job: str
    run: int
    node: int

    @property
    def of_run(self) -> str:
        """How the names of all files of the run begin."""
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
        """What was written last; None if nothing is whole, or the machine was started again since."""
        promises = None
        for slot in (0, 1) if os.pread(self._descriptor, _FIRST_SLOT, 0).rstrip(b"\0") == _boot_id() else ():
            raw = os.pread(self._descriptor, self._slot, _FIRST_SLOT + slot * self._slot)
            number, length, checksum = _HEAD.unpack_from(raw.ljust(_HEAD.size, b"\0"))
            found = raw[_HEAD.size : _HEAD.size + length]
            if number > self._number and zlib.crc32(found, number) == checksum:
                self._number, promises = number, found
        return promises

    def write(self, promises: bytes) -> None:
        """Keep ``promises``. Raises OSError if they are too long."""
        self._number += 1
        record = _HEAD.pack(self._number, len(promises), zlib.crc32(promises, self._number)) + promises
        if len(record) > self._slot:
            raise OSError(f"{self._path}: {len(record)} bytes do not fit into {self._slot}")
        os.pwrite(self._descriptor, record, _FIRST_SLOT + self._number % 2 * self._slot)

    def close(self) -> None:
        """Leave the file to the next agent of this node."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file: nobody goes on here."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self.close()


def begin(place: Place, nodes: int, *, again: bool) -> tuple[Promises, PromiseFile | None]:
    """The promises of ``place``, and the file that keeps them. ``nodes``: the most nodes that the job may have.
    ``again``: an agent was here before; if its file is lost, this node has no vote any more. Raises ElasticError while
    another agent of that node runs on this machine.
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


def _create(place: Place, nodes: int) -> PromiseFile:
    descriptor, path = tempfile.mkstemp(prefix=place.prefix, dir=memory_folder())
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    slot = _SLOT + nodes * _SLOT_PER_NODE
    os.posix_fallocate(descriptor, 0, _FIRST_SLOT + 2 * slot)
    os.pwrite(descriptor, _boot_id(), 0)
    return PromiseFile(path, descriptor)


def clean_up(place: Place, *, ended: bool) -> None:
    """Remove files of this user whose agents are dead: those of the run of ``place``, if it has ended, else those of
    all other runs. If another run goes on, and will have a new agent here, its node has no vote any more.
    """
    for path in _files(_PREFIX):
        if os.path.basename(path).startswith(place.of_run) == ended:
            with contextlib.suppress(OSError, ElasticError):
                os.close(_lock(path))
                os.unlink(path)


def _files(prefix: str) -> list[str]:
    """Files of this user. Names can be chosen by anybody."""
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
