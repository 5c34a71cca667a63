"""The kernel's side of a file system in user space: reading requests from /dev/fuse, and packing answers.

This is the protocol of ``linux/fuse.h``, version 7.31, without libfuse, because the client must decide when to read a
request, and what the kernel may cache.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

LIBC = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2
MAX_WRITE = 128 * 1024
ASYNC_READ, BIG_WRITES, AUTO_INVAL_DATA, PARALLEL_DIROPS = 1, 1 << 5, 1 << 12, 1 << 18
FOPEN_DIRECT_IO = 1

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")


class Op(IntEnum):
    """The operations that the client knows."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    RENAME2 = 45


class Request(NamedTuple):
    """A request of a process. ``node`` is the number of the file; ``uid``, ``gid`` and
    ``pid`` are those of the thread.
    """

    op: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: bytes

    def fields(self, layout: str) -> tuple[int, ...]:
        """The numbers at the start of the body."""
        return struct.unpack_from(f"<{layout}", self.body)

    def names(self, skip: int = 0) -> list[str]:
        """The strings after ``skip`` bytes of the body."""
        return [os.fsdecode(name) for name in self.body[skip:].split(b"\0")[:-1]]

    def forgotten(self) -> list[tuple[int, ...]]:
        """The number of each file that the kernel forgets, with the number of lookups to subtract."""
        several = self.op == Op.BATCH_FORGET
        return list(struct.iter_unpack("<QQ", self.body[8:])) if several else [(self.node, *self.fields("Q"))]


def mount(target: str) -> int:
    """Mount a file system at ``target``, for all users. Returns the descriptor of its requests."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
    if LIBC.mount(b"server:/", os.fsencode(target), b"fuse.nfs", flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")
    return device


def read(device: int) -> Request | None:
    """The next request; None if another thread was faster, or if a process has withdrawn the request."""
    try:
        message = os.read(device, MAX_WRITE + 4096)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EINTR, errno.ENOENT}:
            return None
        raise
    _, op, unique, node, uid, gid, pid, _, _ = _IN.unpack_from(message)
    return Request(op, unique, node, uid, gid, pid, message[_IN.size :])


def answer(device: int, unique: int, body: bytes = b"", error: int = 0) -> None:
    try:
        os.write(device, _OUT.pack(_OUT.size + len(body), -error, unique) + body)
    except OSError as problem:
        if problem.errno != errno.ENOENT:  # the requesting process is gone
            raise


def initialised() -> bytes:
    flags = ASYNC_READ | BIG_WRITES | AUTO_INVAL_DATA | PARALLEL_DIROPS
    return struct.pack("<4I2H2I2HI28x", 7, 31, 128 * 1024, flags, 64, 48, MAX_WRITE, 1, 0, 0, 0)


def attributes(found: os.stat_result, size: int) -> bytes:
    times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
    return _ATTRIBUTES.pack(
        found.st_ino,
        size,
        (size + 511) // 512,
        *(time // 10**9 for time in times),
        *(time % 10**9 for time in times),
        found.st_mode,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        found.st_rdev,
        4096,
        0,
    )


def entry(node: int, attributes: bytes) -> bytes:
    """A name and its file. The kernel caches neither, because the client does."""
    return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + attributes


def listing(entries: Sequence[tuple[str, int, int]], start: int, size: int) -> bytes:
    """The entries (name, inode, mode) from ``start`` on, as many as fit in ``size`` bytes."""
    found = b""
    for position, (name, inode, mode) in enumerate(entries[start:], start + 1):
        encoded = os.fsencode(name)
        packed = struct.pack("<2Q2I", inode, position, len(encoded), mode >> 12) + encoded
        packed += bytes(-len(packed) % 8)
        if len(found) + len(packed) > size:
            break
        found += packed
    return found
