"""One live worker of a node, as its agent sees it: requests to the worker, its answers, why it cannot be kept."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_hpc.workers.aside import OF_A_ROUND
from elastic_hpc.workers.proc import exit_code, is_stopped
from elastic_hpc.workers.standbys import send_go

_ANSWER = 3.0
"""Seconds within which a worker must answer that it pauses. A thread of its own answers, even within a step."""

_LONGEST = 30.0
"""Seconds within which a worker must have paused, however long its steps are: the leader waits for the node."""

_ECHO = 0.5
"""Seconds in which the cause of a broken collective may come from elsewhere: a worker that died, a node that was lost,
or ranks that have paused for a new world.
"""

ENDED = "it has ended"
"""Why a dead worker cannot be kept."""

MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
"""The exceptions that a message raises which does not belong to this protocol."""


class LiveWorker:
    """The connection with one live worker."""

    def __init__(self, pid: int, pidfd: int, connection: socket.socket) -> None:
        self.pid, self.pidfd, self._connection = pid, pidfd, connection
        self.is_new = False
        """This worker was started ahead of the round."""
        self.on_go()

    def on_go(self) -> None:
        """A round begins."""
        self._asked, self._asked_at, self.due = "", 0.0, float("inf")
        """When the worker must have paused, or answered, once it was asked to; on the monotonic clock."""
        self.paused = False
        self.broken = ""
        """Why the worker is blocked although it was not asked to pause; empty if it is not."""
        self.broken_at = 0.0
        self.hopeless = ""
        """Why the worker cannot continue in place."""

    def fileno(self) -> int:
        return self._connection.fileno()

    def pause(self, *, now: bool) -> None:
        """Ask the worker to pause, ``now`` or at the end of its step. Raises OSError."""
        if self.paused or self._asked == "now" or (self._asked and not now):
            return
        self._asked, self._asked_at = "now" if now else "then", time.monotonic()
        self.due = self._asked_at + _ANSWER
        self._connection.send(json.dumps({"do": "pause", "now": now}).encode(), socket.MSG_DONTWAIT)

    def go(self, environ: Mapping[str, str], outputs: Sequence[int]) -> None:
        """Let the worker continue in the world that ``environ`` describes. Raises OSError."""
        of_round = {
            name: value for name, value in environ.items() if name in OF_A_ROUND
        }  # its script may have set other variables
        send_go(self._connection, json.dumps({"do": "go"}).encode(), of_round, outputs)
        self.on_go()

    def read(self) -> bool:
        """Read what the worker has sent. Returns whether it may send more. Raises OSError, ValueError."""
        while True:
            try:
                message = self._connection.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if not message:
                return False
            self._on_message(json.loads(message))

    def _on_message(self, message: Mapping[str, Any]) -> None:
        match message.get("is"):
            case "pausing" if self._asked:
                self.due = self._asked_at + min(float(message["seconds"]), _LONGEST)
            case "paused" if self._asked:  # else this answers a request of the previous round
                self.paused = True
            case "ready":
                self.paused = True
            case "broken":
                self.broken, self.broken_at = str(message["why"]) or "a collective has failed", time.monotonic()
            case "cannot":
                self.hopeless = str(message["why"]) or "the worker cannot continue in place"

    @property
    def tells_at(self) -> float:
        """When the agent must act on a broken collective, on the monotonic clock."""
        return self.broken_at + _ECHO if self.broken and not self._asked else float("inf")

    @property
    def is_pausing(self) -> bool:
        """Whether the worker was asked to pause and may still pause."""
        return bool(self._asked) and not self.obstacle() and not self.paused

    def obstacle(self) -> str:
        """Why the worker cannot be kept; empty if it has paused, or may still pause."""
        if exit_code(self.pidfd) is not None:
            return ENDED
        if self.hopeless:
            return self.hopeless
        if self.paused:
            return ""
        if is_stopped(self.pid):
            return "a signal has stopped it"
        if time.monotonic() >= self.due:
            return f"it has not paused within {self.due - self._asked_at:.3g} s"
        return ""

    def close(self) -> None:
        self._connection.close()


class KeptWorker:
    """A worker that has paused and waits for the next round."""

    def __init__(self, process: subprocess.Popen[bytes], live: LiveWorker, written: Sequence[int] = ()) -> None:
        """``written``: descriptors of the output that the worker wrote to stdout and stderr before its first round."""
        self.process, self.live, self._written = process, live, written
        live.is_new = bool(written)

    def go(self, environ: Mapping[str, str], outputs: Sequence[int]) -> None:
        """See ``LiveWorker.go``. The output that the worker has already written comes first."""
        for source, output in zip(self._written, outputs, strict=False):
            os.write(output, os.pread(source, os.fstat(source).st_size, 0))
        self._close_written()
        self.live.go(environ, outputs)

    def close(self) -> None:
        """This worker is not kept."""
        self._close_written()
        self.live.close()

    def _close_written(self) -> None:
        for source in self._written:
            os.close(source)
        self._written = ()

    def obstacle(self) -> str:
        """Why the worker cannot continue; empty if it can."""
        try:
            goes_on = self.live.read()
        except (OSError, *MALFORMED) as error:
            return str(error)
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # not reaped: keeps its pid
            return "it ended while it waited"
        return self.live.hopeless or ("" if goes_on else "it has closed the connection")
