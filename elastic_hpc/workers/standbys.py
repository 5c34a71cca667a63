"""The standbys of an agent: processes that have started Python and imported modules, and become the next workers."""

from __future__ import annotations

import contextlib
import functools
import logging
import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from elastic_hpc.workers import folder, memory
from elastic_hpc.workers import standby as program
from elastic_hpc.workers.aside import OF_A_ROUND, Changes

log = logging.getLogger(__name__)

SHARE = 0.1
"""The share of the memory free during training that standbys may take."""

_ROOM = 2048
"""Bytes for the variables that torch sets for a worker: rank, world size, addresses, files."""

_KILL_TIMEOUT = 2.0
"""Seconds to wait for the death of a standby, which may hang in a file system while it imports modules."""

_DEATHS = 3
"""Standbys may die this many times while they wait, unless a standby becomes a worker in between; after that, the node
has no more standbys.
"""

_VAIN = 2
"""For this many rounds in a row, standbys may restart as fresh processes because of what their script does."""

Moment = tuple[str, Changes]
"""A module that a script imports, and the changes that the script has made to its variables before."""


@dataclass(frozen=True)
class Started:
    """How many workers of a round were standbys, as far as is known."""

    warm: int = 0
    cold: int = 0
    why: str = ""
    """Why the cold workers were not standbys."""
    standby_mb: float = 0.0
    """Memory of a standby that no other process shares, in MiB; 0 while that is not known."""


def send_go(connection: socket.socket, message: bytes, environ: Mapping[str, str], outputs: Sequence[int]) -> None:
    """Give the process at the other end of ``connection`` its round: ``environ``, and its stdout and stderr. Raises
    OSError if that process is gone.
    """
    content = os.memfd_create("environ")
    try:
        os.write(content, marshal.dumps(dict(environ)))
        socket.send_fds(connection, [message], [*outputs, content])
    finally:
        os.close(content)


class _Standby:
    """One standby, and this end of the connection to it."""

    def __init__(
        self,
        python: Sequence[str],
        argv: Sequence[str],
        modules: Sequence[str],
        moments: Sequence[Moment],
        *,
        local_rank: int,
        learns: bool,
        gently: bool,
    ) -> None:
        """``moments``: what the script of worker ``local_rank`` did in an earlier round. ``learns``: the standby notes
        what its script imports. ``gently``: workers train.
        """
        self.local_rank = local_rank
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
        self._record = open(os.memfd_create("record"), "rb")  # noqa: SIM115 - what the standby writes as a worker
        start = [*python, program.__file__]
        room = sum(len(os.fsencode(word)) + 1 for word in argv) - len(os.fsencode(program.__file__)) - 2
        if room > 0:  # for the command line that is shown later
            start.append(" " * room)
        late = {name: value for name, value in os.environ.items() if name in OF_A_ROUND}
        environ = {name: value for name, value in os.environ.items() if name not in late}
        blanks = " " * (_ROOM + sum(len(os.fsencode(name + value)) + 2 for name, value in late.items()))
        seen = [(name, changes, name not in modules) for name, changes in moments]
        last = moments[-1][1] if moments else {}
        self.ahead = {*modules, *dict(moments)}
        plan = seen + [(name, last, False) for name in modules if name not in dict(moments)]
        try:
            self._socket.send(marshal.dumps((list(argv), plan, learns, self._record.fileno(), gently)))
            self.process = subprocess.Popen(
                start,
                env={**environ, program.SOCKET: f"{theirs.fileno()}{blanks}"},  # it must be the last variable
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
        self.importing = ""
        """The optional module whose import began last."""
        self.started_as = ""
        """``warm`` or ``cold``, once that is known; empty before."""

    def receive(self) -> tuple[float, str, dict[str, str]] | None:
        """What the standby has sent when it became ready, once: the memory that no other process shares, in MiB; why
        the standby cannot become a worker, empty if it can; and modules that the next standbys should not import, each
        with the reason.
        """
        with contextlib.suppress(OSError):
            while message := self._socket.recv(1 << 16, socket.MSG_DONTWAIT):
                what, *rest = marshal.loads(message)  # noqa: S302 - of the same interpreter
                if what == "ready":
                    self.ready = True
                    return tuple(rest)
                (self.importing,) = rest
        return None

    def read(self) -> Iterator[tuple[str, str, list[Moment]]]:
        """What the standby has recorded as a worker: ``warm``, ``cold``, ``late`` or ``seen``; why; the moments."""
        with contextlib.suppress(EOFError, ValueError, TypeError):
            while True:
                yield marshal.load(self._record)  # noqa: S302 - written by the same interpreter and user

    def go(self, environ: Mapping[str, str], outputs: Sequence[int]) -> None:
        """Make the standby a worker. Raises OSError if its process is gone."""
        send_go(self._socket, b"go", environ, outputs)

    def close(self) -> None:
        self._socket.close()
        self._record.close()

    def kill(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_TIMEOUT)
        self.close()


class Standbys:
    """The standbys of one node. No method waits for a standby."""

    def __init__(
        self,
        argv: Sequence[str],
        modules: Sequence[str],
        count: int,
        python: Sequence[str] = (sys.executable, "-u"),
        without: str = "--preload off",
        *,
        learns: bool = False,
    ) -> None:
        """``argv``: the arguments of the interpreter ``python``: ``["train.py", "--lr", "1e-3"]``, or ``["-m", ...]``.
        ``modules``: what standbys import; if empty, there are no standbys, for the reason ``without``. ``count``: the
        number of workers of this node. ``learns``: the standbys for later rounds also import the installed modules that
        the script has imported.
        """
        self._argv, self._modules, self._count = tuple(argv), tuple(modules), count
        self._python, self._learns = tuple(python), learns
        self._waiting: list[_Standby] = []
        self._working: list[_Standby] = []
        """The standbys that became workers of this round."""
        self._kept: list[_Standby] = []
        """The standbys that became workers of an earlier round, and still are workers."""
        self._deaths = self._vain = 0
        self._moments: dict[int, list[Moment]] = {}
        """What the scripts of this node's workers have imported, by local rank."""
        self._left_out: set[str] = set()
        """Modules that standbys do not import although the script does."""
        self._over = not modules
        self._why = without if self._over else "no standby was ready"
        self._in_vain = ""
        """Why a standby of this round restarted as a fresh process, if its script was the reason."""
        self.started = Started()

    @property
    def waiting(self) -> set[int]:
        """The pids of the waiting standbys, each of which leads a session."""
        return {standby.process.pid for standby in self._waiting}

    def prepare(self) -> None:
        """Start the standbys for the first round, all at once, as no worker trains yet."""
        while not self._over and len(self._waiting) < self._count:
            self._start(gently=False)

    def look(self, *, going: bool) -> None:
        """Read what the standbys have sent. While the workers are ``going``, start further standbys one at a time."""
        for standby in (*self._waiting, *self._working):
            if message := standby.receive():
                self._is_ready(standby, *message)
        self._read()
        for standby in self._working if going else ():
            self._note(standby, "warm")  # its script has imported none of the modules so far
        dead = [standby for standby in self._waiting if standby.process.poll() is not None]
        for standby in dead:
            self._waiting.remove(standby)
            standby.close()
            if standby.importing and not standby.ready:
                self._leave_out(standby.importing, "ended the process")
        self._deaths += bool(dead)  # one cause may kill all of them
        if self._deaths >= _DEATHS:
            self._give_up(f"standbys died while they waited, {_DEATHS} times")
        lacking = self._count - len(self._waiting)
        if going and lacking > 0 and not self._over and all(standby.ready for standby in self._waiting):
            needed, free = self._count * self.started.standby_mb, memory.available()
            if needed <= SHARE * free:
                self._start(gently=True)
            else:
                self._why = f"standbys need {needed:.0f} MiB, which is more than {SHARE:.0%} of {free:.0f} MiB free"

    def begin(self, kept: Collection[int] = ()) -> None:
        """The workers of a round are about to be started. ``kept``: the pids of the workers that continue."""
        self._read()
        before, self._working, self._kept = (*self._working, *self._kept), [], []
        for standby in before:
            if standby.process.pid in kept:  # it still writes into its record
                self._kept.append(standby)
            else:
                standby.close()
        self._vain = self._vain + 1 if self._in_vain else 0
        if self._vain >= _VAIN:
            self._give_up(f"{self._in_vain}, otherwise in each round")
            for standby in self._waiting:
                standby.kill()
            self._waiting = []
        self._in_vain = ""
        self.started = Started(standby_mb=self.started.standby_mb)

    def take(
        self, command: Sequence[str], environ: Mapping[str, str], outputs: Sequence[int]
    ) -> subprocess.Popen[bytes] | None:
        """A standby, which becomes the worker ``command``, or None. ``outputs``: its stdout and stderr."""
        while self._waiting and tuple(command) == (*self._python, *self._argv):
            local_rank = int(environ.get("LOCAL_RANK", 0))
            chosen = min(self._waiting, key=lambda standby: standby.local_rank != local_rank)
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
        """End the waiting standbys."""
        for standby in self._waiting:
            standby.kill()
        for standby in (*self._working, *self._kept):
            standby.close()
        self._waiting, self._working, self._kept = [], [], []

    def _start(self, *, gently: bool) -> None:
        taken = [standby.local_rank for standby in self._waiting]
        local_rank = next(rank for rank in range(self._count) if rank not in taken)
        moments = [moment for moment in self._moments.get(local_rank, []) if moment[0] not in self._left_out]
        folder.renew()
        start = functools.partial(_Standby, self._python, self._argv, self._modules, moments)
        try:
            self._waiting.append(start(local_rank=local_rank, learns=self._learns, gently=gently))
        except OSError as error:
            self._give_up(f"no standby could be started: {error}")

    def _read(self) -> None:
        for standby in (*self._working, *self._kept):
            for what, why, moments in standby.read():
                if what in ("warm", "cold") and standby not in self._kept:
                    self._note(standby, what, why)
                if moments and what in ("cold", "late"):
                    then = "it began again as a fresh process" if what == "cold" else "which has no effect on it"
                    log.info("local rank %d: %s: %s; the next standbys import it so", standby.local_rank, why, then)
                    self._differed(standby, why, moments[-1][0])
                if moments:
                    self._moments[standby.local_rank] = list(dict(moments).items())
                if why.startswith("--preload "):  # the next standbys would have the same problem
                    self._give_up(why)

    def _is_ready(self, standby: _Standby, megabytes: float, why: str, unfit: dict[str, str]) -> None:
        self.started = replace(self.started, standby_mb=megabytes)
        for name, reason in unfit.items():
            self._leave_out(name, reason)
        if why and unfit and standby in self._waiting:  # the next standby may be usable
            self._waiting.remove(standby)
            standby.kill()

    def _leave_out(self, name: str, why: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            log.info("the next standbys do not import %s ahead: its import %s", name, why)

    def _differed(self, standby: _Standby, why: str, name: str) -> None:
        if name in standby.ahead and name not in self._modules:
            self._left_out.add(name)
        else:
            self._in_vain = why

    def _note(self, standby: _Standby, how: str, why: str = "") -> None:
        so_far = self.started
        if how == "warm" and not standby.started_as:
            self._deaths = 0
            self.started = replace(so_far, warm=so_far.warm + 1)
        elif how == "cold" and standby.started_as != "cold":
            warm = so_far.warm - (standby.started_as == "warm")
            self.started = replace(so_far, warm=warm, cold=so_far.cold + 1, why=why)
        standby.started_as = standby.started_as if standby.started_as == "cold" else how

    def _give_up(self, why: str) -> None:
        self._over, self._why = True, why
