"""An agent's standbys: workers that have started and imported before their round, and wait for their place in it."""

from __future__ import annotations

import contextlib
import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elastic_hpc import memory, standby
from elastic_hpc.env import AGENT_MARK

SHARE = 0.1
"""Of the memory that is free while the workers train, so much may go into standbys."""

_GUESS = "torch._dynamo"
"""DistributedDataParallel and torch.compile import it at their first use, which takes as long as torch itself."""

_ROOM = 2048
"""Bytes for what torch tells a worker: rank, world size, addresses, files."""

_DEATHS = 3
"""So often standbys may die while they wait, until one has been of use; then the node does without."""


@dataclass(frozen=True)
class Started:
    """How the workers of a round were started, as far as is known."""

    warm: int = 0
    """So many had been standbys."""
    cold: int = 0
    why: str = ""
    """Why those were not."""
    standby_mb: float = 0.0
    """Memory of a standby that no other process shares, in MiB; 0 while that is not known."""


class _Standby:
    """One of them, and this end of the conversation with it."""

    def __init__(self, python: Sequence[str], argv: Sequence[str], modules: Sequence[str], *, gently: bool) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
        start = [*python, standby.__file__]
        room = sum(len(os.fsencode(word)) + 1 for word in argv) - len(os.fsencode(standby.__file__)) - 2
        if room > 0:  # what is shown later needs it
            start.append(" " * room)
        late = {name: value for name, value in os.environ.items() if standby.is_of_a_round(name) and name != AGENT_MARK}
        environ = {name: value for name, value in os.environ.items() if name not in late}
        blanks = " " * (_ROOM + sum(len(os.fsencode(name + value)) + 2 for name, value in late.items()))
        guess = _GUESS if "torch" in modules else ""
        try:
            self._socket.send(marshal.dumps((list(argv), list(modules), guess, gently)))
            self.process = subprocess.Popen(
                start,
                env={**environ, standby.SOCKET: f"{theirs.fileno()}{blanks}"},  # the last one
                stdout=out,
                stderr=err,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        finally:
            theirs.close()
            for descriptor in (out, err):
                os.close(descriptor)
        self.ready = False

    def hear(self) -> list[str]:
        """What it has said since: ``ready MEGABYTES``, then ``warm`` or ``cold WHY``."""
        said = []
        with contextlib.suppress(OSError):
            while message := self._socket.recv(4096, socket.MSG_DONTWAIT):
                said.append(message.decode(errors="replace"))
        self.ready = self.ready or bool(said)
        return said

    def go(self, environ: Mapping[str, str], outputs: Sequence[int]) -> None:
        """Let it run. Raises OSError if it is gone."""
        content = os.memfd_create("environ")
        try:
            os.write(content, marshal.dumps(dict(environ)))
            socket.send_fds(self._socket, [b"go"], [*outputs, content])
        finally:
            os.close(content)

    def close(self) -> None:
        self._socket.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()


class Standbys:
    """Those of one node. Nothing here waits for them."""

    def __init__(
        self,
        argv: Sequence[str],
        modules: Sequence[str],
        count: int,
        python: Sequence[str] = (sys.executable, "-u"),
        without: str = "--preload off",
    ) -> None:
        """``argv``: what the interpreter ``python`` is given: ``["train.py", "--lr", "1e-3"]``, or ``["-m", ...]``.
        ``modules``: what is imported ahead; where there are none, there are no standbys, because of ``without``.
        ``count``: workers of this node.
        """
        self._argv, self._modules, self._count = tuple(argv), tuple(modules), count
        self._python = tuple(python)
        self._waiting: list[_Standby] = []
        self._working: list[_Standby] = []
        self._deaths = 0
        self._over = not modules
        self._why = without if self._over else "no standby was ready"
        self.started = Started()

    def prepare(self) -> None:
        """For the first round: all at once, as nobody trains yet."""
        while not self._over and len(self._waiting) < self._count:
            self._start(gently=False)

    def look(self, *, going: bool) -> None:
        """See what they say. While the workers are ``going``, replace those that work, one after the other."""
        for each in (*self._waiting, *self._working):
            for said in each.hear():
                self._note(*said.partition(" ")[::2])
        died = [each for each in self._waiting if each.process.poll() is not None]
        for each in died:
            self._waiting.remove(each)
            each.close()
        self._deaths += bool(died)  # whoever kills one may well kill them all
        if self._deaths >= _DEATHS:
            self._give_up(f"standbys died while they waited, {_DEATHS} times")
        lacking = self._count - len(self._waiting)
        if going and lacking > 0 and not self._over and all(each.ready for each in self._waiting):
            needed, free = self._count * self.started.standby_mb, memory.available()
            if needed <= SHARE * free:
                self._start(gently=True)
            else:
                self._why = f"standbys need {needed:.0f} MiB, which is more than {SHARE:.0%} of {free:.0f} MiB free"

    def begin(self) -> None:
        """The workers of a round are about to be started."""
        for each in self._working:
            each.close()
        self._working = []
        self.started = Started(standby_mb=self.started.standby_mb)

    def take(
        self, command: Sequence[str], environ: Mapping[str, str], outputs: Sequence[int]
    ) -> subprocess.Popen[bytes] | None:
        """A standby that is the worker ``command`` from now on, None if there is none; ``outputs``: its stdout and
        stderr.
        """
        while self._waiting and tuple(command) == (*self._python, *self._argv):
            chosen = self._waiting.pop(0)
            if chosen.process.poll() is None:
                with contextlib.suppress(OSError):
                    chosen.go(environ, outputs)
                    self._working.append(chosen)
                    return chosen.process
            chosen.kill()
        self._note("cold", self._why)
        return None

    def close(self) -> None:
        """End those that wait."""
        for each in self._waiting:
            each.kill()
        for each in self._working:
            each.close()
        self._waiting, self._working = [], []

    def _start(self, *, gently: bool) -> None:
        try:
            self._waiting.append(_Standby(self._python, self._argv, self._modules, gently=gently))
        except OSError as error:
            self._give_up(f"no standby could be started: {error}")

    def _note(self, what: str, rest: str) -> None:
        known = self.started
        if what == "ready":
            self.started = replace(known, standby_mb=float(rest))
        elif what == "warm":
            self._deaths = 0
            self.started = replace(known, warm=known.warm + 1)
        else:
            self.started = replace(known, cold=known.cold + 1, why=rest)
            if rest.startswith("--preload "):  # it would be no better the next time
                self._give_up(rest)

    def _give_up(self, why: str) -> None:
        self._over, self._why = True, why
