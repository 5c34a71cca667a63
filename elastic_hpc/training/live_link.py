"""The connection between a worker whose script calls ``live`` and the agent of its node: messages on a Unix socket.

A thread reads them, because the main thread may hang in a collective whose peers are gone. The agent sends ``pause``
when the world has ended, and ``go`` with the outputs and the environment of the next round.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_AGAIN = 0.3
"""Seconds between two attempts to free the main thread, until it pauses: it may have opened new connections."""


class Go(NamedTuple):
    """What a worker that keeps its process receives for its next round."""

    outputs: tuple[int, int]
    """Descriptors for stdout and stderr."""
    environ: dict[str, str]

    def take_over(self) -> None:
        """Use the outputs and the variables of the round from now on."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, output in enumerate(self.outputs, 1):
            os.dup2(output, number)
            os.close(output)
        os.environ.update(self.environ)


class LiveLink:
    """``free(now=..., again=...)`` frees the main thread, which may hang because its world has ended. ``now``: the
    agent wants the worker to pause now, not after its step; ``again``: this is not the first attempt. ``seconds``
    returns the seconds within which the main thread will notice a pause. The thread of the link calls both. Raises
    OSError if no agent listens at ``path``.
    """

    def __init__(self, path: str, free: Callable[..., None], seconds: Callable[[], float]) -> None:
        self._path, self._free, self._seconds = path, free, seconds
        self._changed = threading.Condition()
        self._pauses = self._paused = 0
        """How often the agent has sent ``pause``, and for how many of these the main thread has paused."""
        self._now = False
        self._go: Go | None = None
        self._socket: socket.socket | None = None
        self.open()

    def open(self) -> None:
        """Offer this worker to the agent. Does nothing if already connected."""
        if self.is_open:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._path)
            agent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * 4)
            if int.from_bytes(agent[:4], sys.byteorder) != os.getppid():
                raise ConnectionRefusedError("it has started another process, which has started this one")
        except OSError:
            connection.close()
            raise
        self._pauses = self._paused = 0
        self._now, self._go, self._socket = False, None, connection
        self._say({"is": "live"})
        threading.Thread(target=self._listen, args=(connection,), name="elastic_hpc live", daemon=True).start()

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def close(self) -> None:
        """Disconnect: the agent can no longer keep this worker."""
        with self._changed:
            connection, self._socket = self._socket, None
        if connection is not None:
            with contextlib.suppress(OSError):  # the agent is gone
                connection.shutdown(socket.SHUT_RDWR)  # processes that the script has forked may hold the socket open

    @property
    def pausing(self) -> bool:
        """Whether the agent waits for the main thread to pause."""
        return self._pauses > self._paused

    def broken(self, why: str) -> None:
        """Report to the agent that a collective has failed."""
        self._say({"is": "broken", "why": why})

    def cannot(self, why: str) -> None:
        """Report to the agent that this worker ends with an error now."""
        self._say({"is": "cannot", "why": why})

    def wait_for_place(self) -> Go:
        """Wait for the first round: this worker was started before its node had a place in a world."""
        self._say({"is": "ready"})
        return self.stand_still(0)

    def stand_still(self, step: int) -> Go:
        """Pause until the next round. ``step``: the number of steps done. Shut the connections of the group before."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.pausing or self._go)
                if not self.pausing:
                    go, self._go = self._go, None
                    assert go is not None
                    return go
                self._paused = self._pauses
            self._say({"is": "paused", "step": step})

    def _say(self, message: dict[str, Any]) -> None:
        connection = self._socket
        if connection is None:
            return
        try:
            connection.send(json.dumps(message).encode())
        except OSError:  # the thread will notice that the agent is gone
            return

    def _listen(self, connection: socket.socket) -> None:
        while True:
            connection.settimeout(_AGAIN if self.pausing else None)
            try:
                data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * 4), socket.MSG_CMSG_CLOEXEC)
            except TimeoutError:
                if self.pausing:
                    self._free(now=self._now, again=True)
                continue
            except OSError:
                data, ancillary = b"", []
            if not data:
                break
            self._heed(json.loads(data), ancillary)
        if self._socket is connection:
            os.write(2, b"elastic_hpc: the agent of this node is gone, so this worker ends\n")
            os._exit(1)
        connection.close()

    def _heed(self, message: dict[str, Any], ancillary: list[tuple[int, int, bytes]]) -> None:
        if message["do"] == "pause":
            with self._changed:
                self._pauses += 1
                self._now, unused, self._go = message["now"], self._go, None
                for output in unused.outputs if unused else ():
                    os.close(output)
                self._changed.notify_all()
            self._say({"is": "pausing", "seconds": round(self._seconds(), 1)})
            self._free(now=self._now, again=False)
        elif message["do"] == "go":
            data = ancillary[0][2]
            out, err, memory = (int.from_bytes(data[i : i + 4], sys.byteorder) for i in (0, 4, 8))
            environ = marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0))  # noqa: S302 - sent by our own agent
            os.close(memory)
            with self._changed:
                self._go = Go((out, err), environ)
                self._paused = self._pauses
                self._changed.notify_all()
