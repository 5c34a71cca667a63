"""Kills the workers of a round, and reports what could not be killed."""

from __future__ import annotations

import select
import time
from collections.abc import Collection, Mapping, Sequence

from elastic_hpc.workers import guard, proc


def kill_workers(pidfds: Mapping[int, int], mark: bytes, spared: Collection[int], limit: float) -> list[int]:
    """Send SIGKILL to the workers of ``pidfds`` and to all processes that they have started, and wait until all are
    dead, at most ``limit`` seconds: a process that waits for a GPU or a file system dies only when the device or server
    answers.

    ``pidfds``: by pid; each worker leads a session. ``mark``: the entry that the workers have in their environment.
    ``spared``: sessions of other processes with that entry. Returns the pids of the processes that are left.
    """
    deadline = time.monotonic() + limit
    guard.kill_sessions(pidfds)
    left = set(guard.kill_all(mark, spared, limit))
    for pid, pidfd in pidfds.items():
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            left.add(pid)
    return sorted(left)


def could_not_kill(left: Sequence[int], limit: float) -> str:
    """What to report about the processes ``left`` after ``limit`` seconds."""
    shown, more = ", ".join(map(proc.shown, left[:5])), f" and {len(left) - 5} more" if len(left) > 5 else ""
    return f"could not be killed within {limit:.3g} s: {shown}{more}"
