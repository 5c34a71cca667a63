"""The requests of the kernel to a client, operation by operation."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
import threading
import time
from collections.abc import Callable

from sharedfs import fuse
from sharedfs.cache import Cache, Node
from sharedfs.fuse import Op, Request
from sharedfs.link import Link

MOST_DIRTY = 1000
"""Writes to one file, all waiting for the server."""


class Operations:
    """One method for each ``fuse.Op``: returns the body of the answer, or raises OSError."""

    def __init__(self, cache: Cache, link: Link) -> None:
        self._cache, self._link = cache, link
        self._handles: dict[int, tuple[Node, int]] = {}
        self._listings: dict[int, list[tuple[str, int, int]]] = {}
        self._numbers = itertools.count(1)
        self.interrupted = threading.Event()
        """A process of ``client.interrupt`` waits for the answer to ``statfs``."""

    def init(self, _: Request) -> bytes:
        return fuse.initialised()

    def statfs(self, _: Request) -> bytes:
        self.interrupted.wait()
        self._link.ask()
        found = os.statvfs(self._cache.nodes[1].path)
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<5Q4I24x", *counts, found.f_bsize, 255, found.f_frsize, 0)

    def lookup(self, request: Request) -> bytes:
        parent, (name,) = self._cache.node(request.node), request.names()
        if time.monotonic() > parent.names_at + self._link.behaviour().names_s:
            self._cache.look_again(parent)
        with self._cache.lock:
            child = parent.names.get(name)
            known = name in parent.names and not (child and self._cache.is_stale(child))
        if not known:
            self._link.ask()
            with self._cache.lock:
                try:
                    child = self._cache.adopt(parent, name)
                except FileNotFoundError:
                    child = parent.names[name] = None
        if child is None:
            raise FileNotFoundError(errno.ENOENT, name)
        try:
            return self._cache.entry(child)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        with self._cache.lock:  # another client has replaced the file
            child = self._cache.adopt(parent, name)
        return self._cache.entry(child)

    def getattr(self, request: Request) -> bytes:
        node = self._cache.node(request.node)
        return struct.pack("<Q2I", 0, 0, 0) + self._cache.attributes(node)

    def setattr(self, request: Request) -> bytes:
        node = self._cache.node(request.node)
        valid, _, _, size, _, _, _, _, *rest = request.fields("2I6Q8I")
        atime, mtime = request.fields("2I3Q2Q")[5:7]
        atime_ns, mtime_ns, _, mode, _, uid, gid, _ = rest
        self._link.ask()
        self._cache.send(node)
        with self._cache.lock:
            if valid & 1:
                os.chmod(node.path, stat.S_IMODE(mode))
            if valid & 6:
                os.chown(node.path, uid if valid & 2 else -1, gid if valid & 4 else -1)
            if valid & 8:
                os.truncate(node.path, size)
            if valid & 48:
                now, found = time.time_ns(), os.fstat(node.fd)
                given = (atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns)
                old = (found.st_atime_ns, found.st_mtime_ns)
                times = [old[k] if not valid & (16 << k) else now if valid & (128 << k) else given[k] for k in (0, 1)]
                os.utime(node.path, ns=(times[0], times[1]))
            self._cache.fetch(node)
        return struct.pack("<Q2I", 0, 0, 0) + self._cache.attributes(node)

    def readlink(self, request: Request) -> bytes:
        self._link.ask()
        return os.fsencode(os.readlink("", dir_fd=self._cache.node(request.node).fd))

    def _make(self, request: Request, name: str, make: Callable[[Node], None]) -> Node:
        parent = self._cache.node(request.node)
        self._link.ask()
        with self._cache.lock:
            parent.names.pop(name, None)  # also if the name exists: then the next lookup asks the server
            self._link.check_quota()
            make(parent)
            group = -1 if os.fstat(parent.fd).st_mode & stat.S_ISGID else request.gid
            os.chown(name, request.uid, group, dir_fd=parent.fd, follow_symlinks=False)
            self._cache.changed(parent)
            return self._cache.adopt(parent, name)

    def symlink(self, request: Request) -> bytes:
        name, target = request.names()
        return self._cache.entry(self._make(request, name, lambda at: os.symlink(target, name, dir_fd=at.fd)))

    def mknod(self, request: Request) -> bytes:
        (mode, device, _, _), (name,) = request.fields("4I"), request.names(16)
        return self._cache.entry(self._make(request, name, lambda at: os.mknod(name, mode, device, dir_fd=at.fd)))

    def mkdir(self, request: Request) -> bytes:
        (mode, _), (name,) = request.fields("2I"), request.names(8)
        return self._cache.entry(self._make(request, name, lambda at: os.mkdir(name, mode, dir_fd=at.fd)))

    def create(self, request: Request) -> bytes:
        (flags, mode, _, _), (name,) = request.fields("4I"), request.names(16)
        parent = self._cache.node(request.node)
        try:
            with self._cache.lock:
                node = self._cache.adopt(parent, name)
            if flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, name)
            self._link.ask()
        except FileNotFoundError:

            def make(at: Node) -> None:
                exclusive = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                os.close(os.open(name, exclusive, stat.S_IMODE(mode), dir_fd=at.fd))

            node = self._make(request, name, make)
        opened = self._opened(node, flags)
        return self._cache.entry(node) + opened

    def link(self, request: Request) -> bytes:
        (source,), (name,) = request.fields("Q"), request.names(8)
        parent, node = self._cache.node(request.node), self._cache.node(source)
        self._link.ask()
        with self._cache.lock:
            os.link(node.path, name, dst_dir_fd=parent.fd, follow_symlinks=True)
            self._cache.changed(parent)
            self._cache.fetch(node)
            self._cache.adopt(parent, name)
        return self._cache.entry(node)

    def unlink(self, request: Request) -> bytes:
        parent, (name,) = self._cache.node(request.node), request.names()
        self._link.ask()
        with self._cache.lock:
            node = self._cache.gone(parent, name)
            os.rmdir(name, dir_fd=parent.fd) if request.op == Op.RMDIR else os.unlink(name, dir_fd=parent.fd)
            self._cache.changed(parent)
            if node:
                node.removed_here, node.found = True, None
        return b""

    rmdir = unlink

    def rename(self, request: Request) -> bytes:
        second = request.op == Op.RENAME2
        target, flags = request.fields("2Q") if second else (*request.fields("Q"), 0)
        old, new = request.names(16 if second else 8)
        source, folder = self._cache.node(request.node), self._cache.node(target)
        self._link.ask()
        with self._cache.lock:
            replaced = self._cache.gone(folder, new)
            if flags & 1 and (replaced or os.path.lexists(f"{folder.path}/{new}")):  # RENAME_NOREPLACE
                raise FileExistsError(errno.EEXIST, new)
            if flags & ~1:
                raise OSError(errno.EINVAL, "only RENAME_NOREPLACE")
            os.rename(old, new, src_dir_fd=source.fd, dst_dir_fd=folder.fd)
            self._cache.changed(source)
            self._cache.changed(folder)
            if replaced:
                replaced.removed_here, replaced.found = True, None
        return b""

    rename2 = rename

    def _opened(self, node: Node, flags: int) -> bytes:
        """Close-to-open consistency: the attributes come from the server."""
        with self._cache.lock:
            self._cache.fetch(node)
            handle = next(self._numbers)
            self._handles[handle] = node, os.open(node.path, flags & os.O_ACCMODE)
            appends = bool(flags & os.O_APPEND)  # this client may choose the offset
            return struct.pack("<Q2I", handle, fuse.FOPEN_DIRECT_IO if appends else 0, 0)

    def open(self, request: Request) -> bytes:
        node = self._cache.node(request.node)
        self._link.ask()
        return self._opened(node, request.fields("I")[0])

    def read(self, request: Request) -> bytes:
        handle, offset, size = request.fields("2QI")
        node = self._cache.node(request.node)
        self._link.reach()
        self._cache.send(node)
        with self._cache.lock:
            if not os.fstat(node.fd).st_nlink and not node.removed_here:
                self._cache.mark_stale(node)
            return os.pread(self._handles[handle][1], size, offset)

    def write(self, request: Request) -> bytes:
        _, offset, size, _, _, flags, _ = request.fields("2Q2IQ2I")
        node = self._cache.node(request.node)
        if node.failed or len(node.dirty) > MOST_DIRTY:
            self._cache.send(node)
        with self._cache.lock:
            if flags & os.O_APPEND:  # where this client's cache has the end of the file
                offset = max((node.found or self._cache.fetch(node)).st_size, node.end)
            if not node.dirty:
                node.dirty_since = time.monotonic()
            node.dirty.append((offset, request.body[40 : 40 + size]))
        return struct.pack("<2I", size, 0)

    def flush(self, request: Request) -> bytes:
        self._cache.send(self._cache.nodes[request.node])
        return b""

    fsync = flush

    def fsyncdir(self, _: Request) -> bytes:
        return b""

    def release(self, request: Request) -> bytes:
        with self._cache.lock:
            os.close(self._handles.pop(request.fields("Q")[0])[1])
        return b""

    def opendir(self, request: Request) -> bytes:
        folder = self._cache.node(request.node)
        self._cache.look_again(folder)
        if folder.entries is None:
            self._link.ask()
        with self._cache.lock:
            if folder.entries is None:
                with os.scandir(folder.path) as found:
                    folder.entries = [(e.name, e.inode(), e.stat(follow_symlinks=False).st_mode) for e in found]
            handle = next(self._numbers)
            dots = [(".", 1, stat.S_IFDIR), ("..", 1, stat.S_IFDIR)]
            self._listings[handle] = [*dots, *folder.entries]
            return struct.pack("<Q2I", handle, 0, 0)

    def readdir(self, request: Request) -> bytes:
        handle, start, size = request.fields("2QI")
        return fuse.listing(self._listings[handle], start, size)

    def releasedir(self, request: Request) -> bytes:
        self._listings.pop(request.fields("Q")[0], None)
        return b""
