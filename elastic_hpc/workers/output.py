"""Copies the output of a node's workers to the log file and to the agent's own output.

The workers write to files in memory, so no full, slow or stalled file system blocks them. One thread reads these files,
and each destination has a thread of its own, which may block.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Container, Mapping
from pathlib import Path

from elastic_hpc.membership.nodes import NumberRanges
from elastic_hpc.membership.tracebacks import READ
from elastic_hpc.record.worker_logs import Stream, label

_LOOK_INTERVAL = 0.1
_CHUNK = 1 << 20
_KEPT = 2 * READ
"""Bytes at the end of each stream that stay in memory: a traceback is searched there."""

_PART_AFTER, _PART = 1.0, 64 * 1024
"""A line without an end after this many seconds, or with more bytes, is passed on in parts."""

_LIMIT = 64 << 20
"""Maximum number of bytes that wait for a destination."""

_FILE_INTERVAL, _RETRY_INTERVAL = 1.0, 2.0
"""Seconds between two writes to the log file, and after a write that failed."""

_REST = 5.0
"""Seconds in which the rest of the output is passed on when the workers of a round have ended."""

_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_libc = ctypes.CDLL(None)


def is_shown(tee: str | None, local_ranks: str | None, rank: int, local: int) -> bool:
    """Whether agents show the output of ``rank``, the local rank ``local`` of its node, with these values of --tee and
    --local-ranks-filter. Values of torchrun's --tee, such as ``3`` and ``0:3``, mean all ranks.
    """
    if local_ranks and local not in NumberRanges.of(local_ranks):
        return False
    if tee is None:
        return bool(local_ranks) or rank == 0
    return tee in {"all", "1", "2", "3"} or ":" in tee or rank in NumberRanges.of(tee)


class Destination:
    """Writes on a thread of its own. A caller of ``put`` never waits: if more than ``_LIMIT`` bytes wait to be written,
    the oldest are dropped, and a line in their place reports how many.
    """

    _interval = 0.0

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: deque[tuple[Path, bytes]] = deque()
        self._size = self._lost = 0
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, path: Path, data: bytes) -> None:
        """Have ``data`` written. ``path``: the log file of the round."""
        with self._changed:
            self._waiting.append((path, data))
            self._size += len(data)
            while self._size > _LIMIT and len(self._waiting) > 1:
                left_out = len(self._waiting.popleft()[1])
                self._size -= left_out
                self._lost += left_out
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout: float) -> None:
        """Wait, at most ``timeout`` seconds, until all data is written."""
        with self._changed:
            self._ending.set()
            self._changed.notify()
        if self._thread:
            self._thread.join(max(0.0, timeout))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending.is_set())
                if not self._waiting:
                    return
                path, data = self._take()
            self._write(path, data)
            with self._changed:
                self._changed.wait_for(lambda: self._ending.is_set() or self._size > _LIMIT // 8, self._interval)

    def _take(self) -> tuple[Path, bytes]:
        """All data that waits for the log file of the oldest data."""
        path = self._waiting[0][0]
        parts = []
        if self._lost:
            parts.append(self._note(self._lost, self._waiting[0][1]))
            self._lost = 0
        while self._waiting and self._waiting[0][0] == path:
            part = self._waiting.popleft()[1]
            self._size -= len(part)
            parts.append(part)
        return path, b"".join(parts)

    def _note(self, lost: int, following: bytes, /) -> bytes:
        """The line that reports that ``lost`` bytes before ``following`` were dropped."""
        raise NotImplementedError

    def _write(self, path: Path, data: bytes, /) -> None:
        raise NotImplementedError


class LogFile(Destination):
    """This node's log file of a round, in the run directory; made when there is something to write."""

    _interval = _FILE_INTERVAL

    def __init__(self) -> None:
        super().__init__("log file")
        self._path: Path | None = None
        self._end = 0
        """The size of the file without the rest of a failed write."""
        self._failed = self._complained = False

    def _note(self, lost: int, following: bytes) -> bytes:
        moment, rank, _ = following.decode(errors="replace").split(" ", 2)
        note = f"elastic_hpc: {lost} bytes of this node are left out here, as the run directory could not be written"
        return f"{moment} {rank} err F {note}\n".encode()

    def _write(self, path: Path, data: bytes) -> None:
        while True:
            try:
                self._append(path, data)
            except OSError as error:
                self._failed = True
                if not self._complained:
                    self._complained = True
                    said = f"elastic_hpc: {path}: {error.strerror}; workers continue, and up to {_LIMIT >> 20} MiB for "
                    with contextlib.suppress(OSError):  # stderr is a file on the same full disk
                        print(f"{said}this file wait in memory", file=sys.stderr, flush=True)
                if self._ending.wait(_RETRY_INTERVAL):
                    return
            else:
                return

    def _append(self, path: Path, data: bytes) -> None:
        """Closes the file each time: only then does NFS send the data, so that readers on other nodes see them, and
        report whether the server has accepted them.
        """
        if path != self._path:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if path != self._path:
                self._path, self._end, self._failed = path, os.fstat(file).st_size, False
            if self._failed:
                os.ftruncate(file, self._end)
                self._failed = False
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.close(file)
            raise
        os.close(file)
        self._end += len(data)


class Terminal(Destination):
    """The agent's own stdout or stderr, which srun copies to the job's output."""

    def __init__(self, descriptor: int) -> None:
        super().__init__("tee")
        self._descriptor = descriptor

    def _note(self, lost: int, _following: bytes) -> bytes:
        return f"elastic_hpc: {lost} bytes are left out, as srun did not read them; see the log files\n".encode()

    def _write(self, _path: Path, data: bytes) -> None:
        rest = memoryview(data)
        with contextlib.suppress(OSError):  # srun is gone
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


class _Source:
    """One stream of one worker: a file in memory."""

    def __init__(self, rank: int, stream: Stream) -> None:
        self.rank, self.stream = rank, stream
        self._file = os.memfd_create(f"rank{rank}.{stream}")
        self.path = f"/proc/self/fd/{self._file}"
        """Valid in this process, until the file is closed."""
        self.has_more = False
        self._offset = self._freed = 0
        self._begun = b""
        """The beginning of a line."""
        self._begun_at = 0.0

    def read(self, now: float, *, last: bool) -> tuple[bytes, bytes]:
        """The lines that were added, and the beginning of a line that has waited too long for its end. ``last``: the
        workers have ended.
        """
        chunk = os.pread(self._file, _CHUNK, self._offset)
        self.has_more = len(chunk) == _CHUNK
        self._offset += len(chunk)
        self._free()
        if not self._begun:
            self._begun_at = now
        lines, end, begun = (self._begun + chunk).rpartition(b"\n")
        if end:
            self._begun_at = now
        self._begun = begun
        late = now - self._begun_at > _PART_AFTER or len(begun) > _PART or (last and not chunk)
        part = begun if late else b""
        if late:
            self._begun = b""
        return lines + end, part

    @property
    def size(self) -> int:
        """Bytes that were read so far."""
        return self._offset

    def _free(self) -> None:
        """Free the memory of what was read, except the last ``_KEPT`` bytes."""
        upto = (self._offset - _KEPT) // mmap.PAGESIZE * mmap.PAGESIZE
        if upto - self._freed >= _CHUNK:
            begin, length = ctypes.c_int64(self._freed), ctypes.c_int64(upto - self._freed)
            _libc.fallocate(self._file, _PUNCH_HOLE | _KEEP_SIZE, begin, length)
            self._freed = upto

    def close(self) -> None:
        os.close(self._file)


class Output:
    """The output of the workers of one round, and the thread that reads it."""

    def __init__(
        self,
        ranks: Mapping[int, int],
        shown: Container[int],
        path: Path,
        log_file: LogFile,
        terminals: Mapping[Stream, Terminal],
    ) -> None:
        """``ranks``: by local rank. ``shown``: the ranks whose output ``terminals`` get too. ``path``: the log file."""
        self._sources = {(local, kind): _Source(rank, kind) for local, rank in ranks.items() for kind in terminals}
        self._shown, self._path, self._log_file, self._terminals = shown, path, log_file, terminals
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Bytes of the workers' output that were read so far."""
        return sum(source.size for source in self._sources.values())

    def paths(self, stream: Stream) -> dict[int, str]:
        """The files to which the workers write, by local rank."""
        return {local: source.path for (local, kind), source in self._sources.items() if kind == stream}

    def finish(self) -> None:
        """The workers have ended, and ``paths`` are no longer used. The thread passes on the rest, then ends."""
        self._ending.set()

    def join(self, timeout: float) -> None:
        self._thread.join(max(0.0, timeout))

    def _run(self) -> None:
        while not self._ending.wait(0.0 if any(s.has_more for s in self._sources.values()) else _LOOK_INTERVAL):
            self._pass_on(last=False)
        deadline = time.monotonic() + _REST  # a process that could not be killed may keep writing
        while self._pass_on(last=True) and time.monotonic() < deadline:
            pass
        for source in self._sources.values():
            source.close()

    def _pass_on(self, *, last: bool) -> bool:
        """Pass on what the workers have added. Returns whether they have added anything."""
        now, clock, labelled = time.time(), time.monotonic(), []
        any_read = False
        for source in self._sources.values():
            lines, part = source.read(clock, last=last)
            any_read = any_read or bool(lines or part)
            if lines:
                labelled.append(_before_each(label(source.rank, source.stream, now), lines))
            if part:
                labelled.append(label(source.rank, source.stream, now, full=False) + part + b"\n")
            if (lines or part) and source.rank in self._shown:
                shown = lines + part + b"\n" * bool(part)
                shown = shown.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # each state of a progress bar is a line
                self._terminals[source.stream].put(self._path, _before_each(f"[rank{source.rank}]: ".encode(), shown))
        if labelled:
            self._log_file.put(self._path, b"".join(labelled))
        return any_read


def _before_each(prefix: bytes, lines: bytes) -> bytes:
    """``prefix`` before each of ``lines``; the last line ends with a line feed, too."""
    return prefix + lines[:-1].replace(b"\n", b"\n" + prefix) + b"\n"
