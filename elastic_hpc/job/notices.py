"""Notices that a node is about to fail: to one job, or to all jobs with an agent on this machine, also of other users.

A notice is a mark in the job's run directory, in which only its owner may write; on many file servers not even root.
So root starts a process of the owner for each notice, and writes to no path that another user has chosen.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.record import health
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.start import module_command

_PATIENCE = 30
"""Time limit for one notice, in seconds: a file system may hang."""


def notify(rundir: RunDir, node: str, reason: str | None) -> None:
    """Mark ``node`` because of ``reason``; None withdraws the mark. Raises UsageError for a node that the job never
    had, or that has no mark to withdraw, and ElasticError if the run directory cannot be written.
    """
    nodes = {event["node"] for event in rundir.events() if event["event"] == "join"}
    if node not in nodes:
        known = f"its nodes: {', '.join(sorted(nodes))}" if nodes else "none has joined yet"
        raise UsageError(f"{node!r}: job {rundir.path.name} never had that node; {known}")
    try:
        if reason is not None:
            health.mark(rundir.notices, node, reason)
        elif not health.unmark(rundir.notices, node):
            raise UsageError(f"{node}: job {rundir.path.name} has no notice to withdraw")
    except OSError as error:
        raise ElasticError(f"{rundir.notices}: {error.strerror}") from error


def jobs_on(node: str) -> dict[Path, int]:
    """The run directories of the jobs with an agent on ``node``, if that is this machine, with the ids of their owners,
    as far as this user may see the processes; root sees the processes of all users. Root's own jobs are left out,
    because anybody may have started a program that runs as root, with any arguments.
    """
    found: dict[Path, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended, is no agent, or is another user's
            words = (process / "cmdline").read_bytes().split(b"\0")
            run_dir = words[words.index(b"--run-dir", words.index(b"elastic_hpc.agent")) + 1]
            environ = (process / "environ").read_bytes().split(b"\0")
            shown = (process / "status").read_text().split("\nUid:", 1)[1].split("\n", 1)[0]
            owners = {int(word) for word in shown.split()}  # real, effective, saved, and for files
            if f"SLURMD_NODENAME={node}".encode() in environ and len(owners) == 1 and 0 not in owners:
                found[Path(os.fsdecode(run_dir))] = owners.pop()
    return found


def as_owner(owner: int, arguments: Sequence[str]) -> str:
    """What ``elastic-hpc ARGUMENTS`` prints for the user ``owner``. Raises ElasticError if it fails."""
    try:
        user = pwd.getpwuid(owner)
        done = subprocess.run(
            module_command(sys.executable, "elastic_hpc", *arguments),
            user=owner,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            env={"HOME": user.pw_dir, "PATH": os.defpath},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, KeyError, subprocess.SubprocessError) as error:
        raise ElasticError(f"no process of user {owner}: {error}") from None
    if done.returncode:
        raise ElasticError(done.stderr.strip().removeprefix("elastic-hpc: ") or f"exit code {done.returncode}")
    return done.stdout
