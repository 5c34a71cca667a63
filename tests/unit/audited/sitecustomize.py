"""Python imports this file first where its folder is on PYTHONPATH. In an agent, this file records in AUDIT_LOG each
file access of the control thread, and of any thread that holds the lock that the control thread takes.
"""

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

HARMLESS = (
    *("sys._getframe", "sys.set_asyncgen_hook", "object.", "code.__new__", "gc.", "builtins.id", "_thread."),
    *(
        "socket.__new__",
        "socket.bind",
        "socket.connect",
        "socket.sendmsg",
    ),  # no files: all addresses are numeric
    *("fcntl.ioctl", "array."),  # reads the addresses of the interfaces from a socket
)
"""Prefixes of audit events that access no file."""

ON_PATHS = ("stat", "lstat", "access", "readlink", "statvfs", "getxattr")
ON_DESCRIPTORS = ("read", "write", "pread", "pwrite", "preadv", "pwritev", "fsync", "fdatasync", "ftruncate")
"""Functions of ``os`` without an audit event. The second group is harmless on sockets, pipes and event descriptors."""

CLOCK = ("localtime", "strftime", "ctime", "mktime", "tzset")
"""Functions of ``time`` that may read the time zone file."""

_write, _fstat, _readlink = os.write, os.fstat, os.readlink
_busy = threading.local()


class Audit:
    def __init__(self, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._seen = False
        sys.addaudithook(self._on_event)
        for name in ON_PATHS:
            setattr(os, name, Watched(self, f"os.{name}", getattr(os, name)))
        for name in ON_DESCRIPTORS:
            setattr(os, name, Watched(self, f"os.{name}", getattr(os, name), on_descriptor=True))
        for name in CLOCK:
            setattr(time, name, Watched(self, f"time.{name}", getattr(time, name)))
        sys.stdout, sys.stderr = Output(sys.stdout, self), Output(sys.stderr, self)

    def note(self, what: str, args: tuple[Any, ...]) -> None:
        if getattr(_busy, "on", False):
            return
        _busy.on = True
        try:
            if where := self._where():
                stack = [f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" for frame in _frames()]
                _write(self._log, f"{where}: {what} {args!r:.200} in {' < '.join(stack[:12])}\n".encode())
        finally:
            _busy.on = False

    def _where(self) -> str:
        thread = threading._active.get(threading.get_ident())  # type: ignore[attr-defined]
        if thread is not None and thread.name == "control":
            return "the control thread"
        for frame in _frames():
            lock = getattr(frame.f_locals.get("self"), "_changed", None)
            if isinstance(lock, threading.Condition) and lock._is_owned():  # type: ignore[attr-defined]
                return "with the lock"
        return ""

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        if not event.startswith(HARMLESS):
            self.note(event, args)
        elif event.startswith("sys.set_asyncgen_hook") and not self._seen:
            self._seen = True
            _write(self._log, b"an event loop began\n")


def _keeps_promises(descriptor: int) -> bool:
    """Whether ``descriptor`` belongs to the only file that the control thread may write, because it is in memory."""
    return _readlink(f"/proc/self/fd/{descriptor}").startswith("/dev/shm/elastic-hpc-promises-")


def _frames() -> Iterator[FrameType]:
    """The stack outside of this file."""
    frame: FrameType | None = sys._getframe()
    while frame:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


class Watched:
    """Behaves like a C function: as a class attribute, as ``time.localtime`` in ``logging``, it does not become a
    method.
    """

    def __init__(self, audit: Audit, name: str, real: Callable[..., Any], *, on_descriptor: bool = False) -> None:
        self._audit, self._name, self._real, self._on_descriptor = audit, name, real, on_descriptor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._on_descriptor or (stat.S_ISREG(_fstat(args[0]).st_mode) and not _keeps_promises(args[0])):
            self._audit.note(self._name, args)
        return self._real(*args, **kwargs)


class Output:
    """stdout or stderr, which may stall like a file system."""

    def __init__(self, real: Any, audit: Audit) -> None:
        self._real, self._audit = real, audit

    def write(self, text: str) -> int:
        self._audit.note("write", (text,))
        return int(self._real.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


if "elastic_hpc.agent" in sys.orig_argv and "AUDIT_LOG" in os.environ:
    Audit(os.environ["AUDIT_LOG"])
