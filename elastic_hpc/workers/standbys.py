"""An agent's standbys: workers that have started and imported before their round, and wait for their place in it."""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from elastic_hpc.workers import memory, standby
from elastic_hpc.workers.aside import OF_A_ROUND, Changes

log = logging.getLogger(__name__)

SHARE = 0.1
"""Of the memory that is free while the workers train, so much may go into standbys."""

_LATER = "torch._dynamo"
"""DistributedDataParallel and torch.compile import it at their first use, which takes as long as torch itself. A script
that was seen to do so gets it ahead too.
"""

_ROOM = 2048
"""Bytes for what torch tells a worker: rank, world size, addresses, files."""

_DEATHS = 3
"""So often standbys may die while they wait, until one has been of use; then the node does without."""

_VAIN = 2
"""So many rounds in a row standbys may begin again as fresh processes, because the script changes what they go by."""

Moment = tuple[str, Changes]
"""What a script imports, and what it has done to its variables before."""


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

    def __init__(
        self,
        python: Sequence[str],
        argv: Sequence[str],
        modules: Sequence[str],
        moments: Sequence[Moment],
        *,
        local_rank: int,
        gently: bool,
    ) -> None:
        """``moments``: what is known of the script of the worker ``local_rank``."""
        self.local_rank = local_rank
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
        self._record = open(os.memfd_create("record"), "rb")  # noqa: SIM115 - what it says when it works
        start = [*python, standby.__file__]
        room = sum(len(os.fsencode(word)) + 1 for word in argv) - len(os.fsencode(standby.__file__)) - 2
        if room > 0:  # what is shown later needs it
            start.append(" " * room)
        late = {name: value for name, value in os.environ.items() if name in OF_A_ROUND}
        environ = {name: value for name, value in os.environ.items() if name not in late}
        blanks = " " * (_ROOM + sum(len(os.fsencode(name + value)) + 2 for name, value in late.items()))
        known = [(name, changes, name not in modules) for name, changes in moments]
        last = moments[-1][1] if moments else {}
        self.ahead = {*modules, *dict(moments)}
        plan = known + [(name, last, False) for name in modules if name not in dict(moments)]
        watched = _LATER if "torch" in modules and _LATER not in self.ahead else ""
        try:
            self._socket.send(marshal.dumps((list(argv), plan, watched, self._record.fileno(), gently)))
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
        self.was = ""
        """Whether it went on warm or cold, as far as is known."""

    def hear(self) -> str:
        """What it has said since: ``ready MEGABYTES``, once."""
        said = b""
        with contextlib.suppress(OSError):
            said = self._socket.recv(4096, socket.MSG_DONTWAIT)
        self.ready = self.ready or bool(said)
        return said.decode()

    def read(self) -> Iterator[tuple[str, str, list[Moment]]]:
        """What it has recorded since it works: ``warm``, ``cold``, ``late``, ``seen``; why; its script's moments."""
        with contextlib.suppress(EOFError, ValueError, TypeError):
            while True:
                yield marshal.load(self._record)  # noqa: S302 - of the same interpreter and user

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
        self._record.close()

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
        self._deaths = self._vain = 0
        self._moments: dict[int, list[Moment]] = {}
        """Of the scripts of this node's workers, by local rank."""
        self._unsteady: set[str] = set()
        """What these import, but not with the same variables each time; it is not imported ahead."""
        self._over = not modules
        self._why = without if self._over else "no standby was ready"
        self._in_vain = ""
        """Why a standby of this round went on as a fresh process, if its script was the reason."""
        self.started = Started()

    @property
    def waiting(self) -> set[int]:
        """The pids of the standbys that wait, each of which leads a session."""
        return {standby.process.pid for standby in self._waiting}

    def prepare(self) -> None:
        """For the first round: all at once, as nobody trains yet."""
        while not self._over and len(self._waiting) < self._count:
            self._start(gently=False)

    def look(self, *, going: bool) -> None:
        """See what they say. While the workers are ``going``, replace those that work, one after the other."""
        for each in (*self._waiting, *self._working):
            if said := each.hear():
                self.started = replace(self.started, standby_mb=float(said.partition(" ")[2]))
        self._read()
        for each in self._working if going else ():
            self._note(each, "warm")  # its script needs nothing of what was imported, up to now
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
        self._read()
        for each in self._working:
            each.close()
        self._working = []
        self._vain = self._vain + 1 if self._in_vain else 0
        if self._vain >= _VAIN:
            self._give_up(f"{self._in_vain}, otherwise in each round")
            for each in self._waiting:
                each.kill()
            self._waiting = []
        self._in_vain = ""
        self.started = Started(standby_mb=self.started.standby_mb)

    def take(
        self, command: Sequence[str], environ: Mapping[str, str], outputs: Sequence[int]
    ) -> subprocess.Popen[bytes] | None:
        """A standby that is the worker ``command`` from now on, None if there is none; ``outputs``: its stdout and
        stderr.
        """
        while self._waiting and tuple(command) == (*self._python, *self._argv):
            local_rank = int(environ.get("LOCAL_RANK", 0))
            chosen = min(self._waiting, key=lambda each: each.local_rank != local_rank)
            self._waiting.remove(chosen)
            if chosen.process.poll() is None:
                with contextlib.suppress(OSError):
                    chosen.go(environ, outputs)
                    self._working.append(chosen)
                    return chosen.process
            chosen.kill()
        self.started = replace(self.started, cold=self.started.cold + 1, why=self._why)
        return None

    def close(self) -> None:
        """End those that wait."""
        for each in self._waiting:
            each.kill()
        for each in self._working:
            each.close()
        self._waiting, self._working = [], []

    def _start(self, *, gently: bool) -> None:
        taken = [each.local_rank for each in self._waiting]
        local_rank = next(rank for rank in range(self._count) if rank not in taken)
        moments = [moment for moment in self._moments.get(local_rank, []) if moment[0] not in self._unsteady]
        try:
            self._waiting.append(
                _Standby(self._python, self._argv, self._modules, moments, local_rank=local_rank, gently=gently)
            )
        except OSError as error:
            self._give_up(f"no standby could be started: {error}")

    def _read(self) -> None:
        for each in self._working:
            for what, why, moments in each.read():
                if what in ("warm", "cold"):
                    self._note(each, what, why)
                if moments and what in ("cold", "late"):
                    then = "it began again as a fresh process" if what == "cold" else "which has no effect on it"
                    log.info("local rank %d: %s: %s; the next standbys import it so", each.local_rank, why, then)
                    self._differed(each, why, moments[-1][0])
                if moments:
                    self._moments[each.local_rank] = list(dict(moments).items())
                if why.startswith("--preload "):  # it would be no better the next time
                    self._give_up(why)

    def _differed(self, standby: _Standby, why: str, name: str) -> None:
        if name in standby.ahead and name not in self._modules:
            self._unsteady.add(name)
        else:
            self._in_vain = why

    def _note(self, standby: _Standby, how: str, why: str = "") -> None:
        known = self.started
        if how == "warm" and not standby.was:
            self._deaths = 0
            self.started = replace(known, warm=known.warm + 1)
        elif how == "cold" and standby.was != "cold":
            self.started = replace(known, warm=known.warm - (standby.was == "warm"), cold=known.cold + 1, why=why)
        standby.was = standby.was if standby.was == "cold" else how

    def _give_up(self, why: str) -> None:
        self._over, self._why = True, why
