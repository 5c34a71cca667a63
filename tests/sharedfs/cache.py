"""A client's cache of the server's files, and the written data that it has not sent yet."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from sharedfs import fuse
from sharedfs.link import Link


@dataclass
class Node:
    """A file, folder or link that the kernel knows, and this client's cache of it."""

    id: int
    fd: int
    lookups: int = 0
    epoch: int = 0
    found: os.stat_result | None = None
    found_at: float = 0.0
    names: dict[str, Node | None] = field(default_factory=dict)
    """The names in a folder; None for a name that did not exist."""
    entries: list[tuple[str, int, int]] | None = None
    names_mtime: int = 0
    names_at: float = -math.inf
    """When this client last asked the server whether the names have changed."""
    dirty: list[tuple[int, bytes]] = field(default_factory=list)
    dirty_since: float = 0.0
    failed: int = 0
    """The error of a failed write that was not reported yet."""
    removed_here: bool = False
    """This client removed the last name, so it keeps the file for processes that have it open."""
    stale: bool = False

    @property
    def end(self) -> int:
        return max((offset + len(data) for offset, data in self.dirty), default=0)

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.fd}"


class Cache:
    """``lock`` guards the whole cache. No thread holds it while the server delays an answer."""

    def __init__(self, server: str, link: Link) -> None:
        self._link = link
        self.lock = threading.RLock()
        root = Node(1, os.open(server, os.O_PATH | os.O_DIRECTORY), lookups=1)
        self.nodes = {1: root}
        self._by_inode: dict[tuple[int, int], Node] = {self._inode(root): root}
        self._last = 1

    @staticmethod
    def _inode(node: Node) -> tuple[int, int]:
        found = os.fstat(node.fd)
        return found.st_dev, found.st_ino

    def node(self, id: int) -> Node:
        """The file with this number. Raises OSError if the server has forgotten it."""
        node = self.nodes[id]
        if self.is_stale(node):
            self.mark_stale(node)
        return node

    def is_stale(self, node: Node) -> bool:
        return node.stale or (node.id != 1 and node.epoch != self._link.behaviour().epoch)

    @staticmethod
    def mark_stale(node: Node) -> None:
        """Mark the file as stale. Raises OSError, as will each later access by the file's number."""
        node.stale = True
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def fetch(self, node: Node) -> os.stat_result:
        """The attributes from the server."""
        found = os.fstat(node.fd)
        if not found.st_nlink and not node.removed_here:
            self.mark_stale(node)
        node.found, node.found_at = found, time.monotonic()
        return found

    def attributes(self, node: Node) -> bytes:
        """The attributes, from the cache while it is valid."""
        if node.found is None or time.monotonic() > node.found_at + self._link.behaviour().attributes_s:
            self._link.ask()
            with self.lock:
                self.fetch(node)
        with self.lock:
            found = node.found or self.fetch(node)
            return fuse.attributes(found, max(found.st_size, node.end))

    def look_again(self, folder: Node) -> None:
        """Forget the names of a folder that has changed on the server."""
        self._link.ask()
        with self.lock:
            found = self.fetch(folder)
            folder.names_at = time.monotonic()
            if found.st_mtime_ns != folder.names_mtime:
                folder.names_mtime = found.st_mtime_ns
                folder.names.clear()
                folder.entries = None

    def changed(self, folder: Node) -> None:
        """This client has changed ``folder``, so it asks the server for all names again."""
        folder.names.clear()
        folder.entries, folder.found, folder.names_at = None, None, -math.inf

    def adopt(self, parent: Node, name: str) -> Node:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent.fd)
        node = Node(self._last + 1, fd, epoch=self._link.behaviour().epoch)
        known = self._by_inode.get(self._inode(node))
        if known is None or self.is_stale(known):  # processes that have a stale file open keep that file
            self._last = node.id
            self.nodes[node.id] = self._by_inode[self._inode(node)] = known = node
        else:
            os.close(fd)
        parent.names[name] = known
        return known

    def entry(self, node: Node) -> bytes:
        with self.lock:
            if node.stale:  # forgotten in the meantime
                self.mark_stale(node)
            node.lookups += 1
        return fuse.entry(node.id, self.attributes(node))

    def forget(self, pairs: Iterable[tuple[int, ...]]) -> None:
        """``pairs``: as ``fuse.Request.forgotten`` returns them."""
        with self.lock:
            for id, count in pairs:
                if (node := self.nodes.get(id)) is None or id == 1:
                    continue
                node.lookups -= count
                if node.lookups <= 0 and not node.dirty:
                    del self.nodes[id]
                    if self._by_inode.get(inode := self._inode(node)) is node:
                        del self._by_inode[inode]
                    os.close(node.fd)
                    node.fd, node.stale = -1, True

    def gone(self, folder: Node, name: str) -> Node | None:
        """The file whose name this client is about to remove."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
            return self._by_inode.get((found.st_dev, found.st_ino))
        return None

    # written data that is not on the server yet

    def send(self, node: Node) -> None:
        """Send all dirty data to the server. Raises OSError once for a failed write."""
        if node.dirty:
            self._link.reach()
        with self.lock:
            self._flush_node(node)

    def _flush_node(self, node: Node) -> None:
        if node.dirty:
            dirty, node.dirty = node.dirty, []
            try:
                self._link.check_quota(max(offset + len(data) for offset, data in dirty) - self.fetch(node).st_size)
                file = os.open(node.path, os.O_WRONLY)
                try:
                    for offset, data in dirty:
                        os.pwrite(file, data, offset)
                finally:
                    os.close(file)
            except OSError as error:
                node.failed = error.errno or errno.EIO
            with contextlib.suppress(OSError):
                self.fetch(node)
        failed, node.failed = node.failed, 0
        if failed:
            raise OSError(failed, os.strerror(failed))

    def write_back(self) -> None:
        if self._link.behaviour().stopped:
            return
        before = time.monotonic() - self._link.behaviour().write_back_s
        with self.lock:
            for node in [node for node in self.nodes.values() if node.dirty and node.dirty_since < before]:
                try:
                    self._flush_node(node)
                except OSError as error:
                    node.failed = error.errno or errno.EIO
