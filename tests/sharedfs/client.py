"""One node's mount of the shared file system. It acts as the NFS client of that node's kernel, with caches of its own.

``python -m sharedfs.client SERVER CONTROL TARGET`` mounts the folder SERVER at TARGET and writes ``ready``. The file
CONTROL says how the server behaves, see ``sharedfs.Behaviour``. The kernel caches no names and no attributes: only
this cache can be stale. Data that no process has closed or synced exists in this process alone, as in a node's memory.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sharedfs import Behaviour, fuse
from sharedfs.cache import Cache
from sharedfs.fuse import Op, Request
from sharedfs.link import Link
from sharedfs.operations import Operations


class Client:
    """Answers the kernel's requests."""

    def __init__(self, server: str, control: Path, device: int) -> None:
        self._device = device
        self._link = Link(control)
        self._cache = Cache(server, self._link)
        self._operations = Operations(self._cache, self._link)
        self.interrupted = self._operations.interrupted

    def serve(self) -> None:
        """Serve the kernel until the file system is unmounted."""
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        threads = ThreadPoolExecutor(1000)  # one thread for each process that may wait for the server
        while True:
            poll.poll(20)
            try:
                request = fuse.read(self._device)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            if request is not None:
                threads.submit(self._answer, request)
            self._cache.write_back()

    def _answer(self, request: Request) -> None:
        self._link.serve(request.pid)
        try:
            if request.op == Op.INTERRUPT:  # ENOSYS: the kernel sends no more interrupts, and processes wait in state D
                fuse.answer(self._device, request.unique, error=errno.ENOSYS)
                self.interrupted.set()
            elif request.op in {Op.FORGET, Op.BATCH_FORGET}:
                self._cache.forget(request.forgotten())
            else:
                handle = getattr(self._operations, Op(request.op).name.lower())
                fuse.answer(self._device, request.unique, handle(request))
        except ValueError:
            fuse.answer(self._device, request.unique, error=errno.ENOSYS)
        except OSError as error:
            fuse.answer(self._device, request.unique, error=error.errno or errno.EIO)
        except Exception:  # noqa: BLE001 - or the process would wait forever
            fuse.answer(self._device, request.unique, error=errno.EIO)
            traceback.print_exc()


def interrupt(target: str, device: int) -> int:
    """Start a process whose first call is interrupted by a signal. The kernel then sends an interrupt request to the
    client; after the answer, all processes wait in state D, as they do for NFS.
    """
    if child := os.fork():
        return child
    os.close(device)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    os.statvfs(target)
    os._exit(0)


def main(server: str, control: str, target: str) -> None:
    os.umask(0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    device = fuse.mount(target)
    like_nfs = not Behaviour.read(Path(control)).like_fuse
    child = interrupt(target, device) if like_nfs else 0
    client = Client(server, Path(control), device)

    def ready() -> None:
        if like_nfs:
            client.interrupted.wait()
            os.waitpid(child, 0)
        print("ready", flush=True)

    threading.Thread(target=ready, daemon=True).start()
    client.serve()
    os._exit(0)  # no process depends on the remaining threads


if __name__ == "__main__":
    main(*sys.argv[1:])
