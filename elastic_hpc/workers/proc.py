"""What the kernel knows about a process: its state, its parent, its variables, how it ended. Reads ``/proc``.

A process that is gone has no parent and no variables, is not stopped, and handles no signal. ``guard``, ``standby`` and
``aside`` run outside the package and import nothing from it, so they read the few files that they need themselves.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

_FUSE = "request_wait_answer"
"""The function of the kernel in which a thread waits for the program behind the file system."""


def exit_code(pidfd: int) -> int | None:
    """Exit code of a child, minus the signal if a signal killed it; None while it lives. torch reaps the child, and the
    exit code is 0 after that.
    """
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process (SIGSTOP)."""
    return _stat(pid)[0] == b"T"


def shown(pid: int) -> str:
    """The process in a message: ``python3 (pid 17, state D)``. Does not block if the process hangs in the kernel."""
    name = "process"
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    return f"{name} (pid {pid}, state {_stat(pid)[0].decode()})"


def is_busy(pid: int) -> bool:
    """Whether the process is running, like a killed process while it frees its memory."""
    return _stat(pid)[0] == b"R"


def parent(pid: int) -> int:
    return int(_stat(pid)[1])


def sessions_of(pids: Collection[int]) -> set[int]:
    """The sessions of the processes ``pids``, and of all their descendants."""
    parents, sessions = _everybody()
    return {sessions[pid] for pid in _tree(pids, parents) if pid in sessions}


def trees_of(pids: Collection[int]) -> list[set[int]]:
    """For each of the processes ``pids``: itself, and all its descendants."""
    parents, _ = _everybody()
    return [_tree([pid], parents) for pid in pids]


def _everybody() -> tuple[dict[int, int], dict[int, int]]:
    """The parents and the sessions of all processes."""
    parents, sessions = {}, {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and len(stat := _stat(pid := int(entry.name))) > 3:
            parents[pid], sessions[pid] = int(stat[1]), int(stat[3])
    return parents, sessions


def _tree(pids: Collection[int], parents: dict[int, int]) -> set[int]:
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found


def cpu_ticks(pid: int) -> int:
    """CPU time of all threads of the process, in clock ticks."""
    stat = _stat(pid)
    return int(stat[11]) + int(stat[12]) if len(stat) > 12 else 0


def waits_for_device(pid: int) -> bool:
    """Whether a thread of the process waits uninterruptibly in the kernel, or, interruptibly, for a file system in user
    space (FUSE).
    """
    return any(_stat(thread)[0] == b"D" or _waits_in(thread) == _FUSE for thread in _threads(pid))


def wants_cpu(pid: int) -> bool:
    """Whether a thread of the process runs, or is ready to run but has no CPU."""
    return any(_stat(thread)[0] == b"R" for thread in _threads(pid))


def _threads(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    return []


def _waits_in(thread: int) -> str:
    """The function of the kernel; ``0`` or empty if unknown."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{thread}/wchan").read_text()
    return ""


def all_pids() -> list[int]:
    """All processes that this user can see."""
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal()]


def command_line(pid: int) -> list[str]:
    return _words(pid, "cmdline")


def environment(pid: int) -> dict[str, str]:
    """The environment that the process was started with; empty for a process of another user."""
    return dict(word.partition("=")[::2] for word in _words(pid, "environ"))


def variable(pid: int, name: str) -> str | None:
    """The value of ``name`` in that environment."""
    return environment(pid).get(name)


def _words(pid: int, file: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.fsdecode(Path(f"/proc/{pid}/{file}").read_bytes()).split("\0")[:-1]
    return []


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler of signal ``number``, or blocks it in its first thread, to wait for the signal
    in another thread.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigCgt:", "SigBlk:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def _stat(pid: int) -> list[bytes]:
    """State, parent and so on: the fields of ``stat`` after the name, which may contain blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split() or [b"X", b"0"]
    except OSError:
        return [b"X", b"0"]
