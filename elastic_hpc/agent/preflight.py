"""Checks of one node before its agent joins the job. Each problem is one line."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from elastic_hpc.network import addresses

LIMIT = 10.0
"""Seconds after which a check that has not returned is a problem."""
GPU_LIMIT = 30.0
"""The limit for nvidia-smi, which wakes one GPU after another where the driver does not stay loaded."""
COMMAND_LIMIT = 60.0
_NAMES_LIMIT = 2.0
_SKEW = 5.0
_DYING = 5.0
"""Seconds that processes of the previous job get to leave the GPUs."""
_MIB = 1 << 20
_SPARSE, _FULL = 1024 * _MIB, 16 * _MIB

_SHARED = "choose a folder that all nodes share: --log-dir DIR"


@dataclass(frozen=True)
class Problem:
    """``what``: what was found, what was expected, and what to do. ``fatal``: the job cannot use the node."""

    what: str
    fatal: bool


@dataclass
class _Check:
    """``run`` is called on a thread of its own; ``late`` is the problem if it takes longer than ``limit`` seconds."""

    limit: float
    run: Callable[[], Iterator[Problem]]
    late: Problem
    found: list[Problem] = field(default_factory=list)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.found.extend(self.run()), name="preflight", daemon=True)
        thread.start()
        return thread


def check(
    rundir: Path,
    *,
    gpus: int | None = None,
    cuda_visible: str | None = None,
    command: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Problem]:
    """The problems of this node, fatal problems first. A check that hangs is a problem, and its thread is abandoned.

    ``gpus``: how many Slurm granted on this node. ``cuda_visible``: the value of ``CUDA_VISIBLE_DEVICES``.
    ``command``: the site's own check, a command line, which gets the environment ``environ``.
    """
    silent = f"no answer within {LIMIT:.0f} s"
    checks = [
        _Check(_NAMES_LIMIT, _names, Problem(_slow_names(), fatal=False)),
        _Check(LIMIT, partial(_run_dir, rundir), Problem(f"run directory {rundir}: {silent}; {_SHARED}", fatal=True)),
        _Check(LIMIT, _temp_dir, Problem(f"temporary directory: {silent}; set TMPDIR", fatal=True)),
    ]
    if gpus:
        hung = f"nvidia-smi: no answer within {GPU_LIMIT:.0f} s; the driver or a GPU hangs, have this node drained"
        checks.append(_Check(GPU_LIMIT, partial(_gpus, gpus, cuda_visible), Problem(hung, fatal=True)))
    if command:
        hung = f"--preflight {command!r}: not finished within {COMMAND_LIMIT:.0f} s; expected exit code 0"
        checks.append(_Check(COMMAND_LIMIT + 2, partial(_command, command, environ), Problem(hung, fatal=True)))
    started = time.monotonic()
    problems = []
    threads = [(check, check.start()) for check in sorted(checks, key=lambda check: check.limit)]
    for check, thread in threads:
        thread.join(max(0.0, started + check.limit - time.monotonic()))
        problems += [check.late] if thread.is_alive() else check.found
    return sorted(problems, key=lambda problem: not problem.fatal)


def _run_dir(path: Path) -> Iterator[Problem]:
    """Write, sync and remove a file; its modification time shows the clock of the file server."""
    probe = path / f".preflight.{socket.gethostname()}.{os.getpid()}"
    try:
        before = time.time()
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, bytes(4096))
            os.fsync(descriptor)
            written = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            os.unlink(probe)
        after = time.time()
    except OSError as error:
        yield Problem(f"run directory {path}: {error.strerror}; {_SHARED}", fatal=True)
        return
    skew = min(0.0, written - before) or max(0.0, written - after)
    if abs(skew) > _SKEW:
        yield Problem(
            f"the clock of this node is {abs(skew):.0f} s {'ahead of' if skew < 0 else 'behind'} the file server's, "
            f"expected less than {_SKEW:.0f}; times in logs are misleading, see chronyc tracking",
            fatal=False,
        )
    yield from _space("run directory", path, "remove old runs, or choose another: --log-dir DIR")


def _temp_dir() -> Iterator[Problem]:
    try:
        path = Path(tempfile.gettempdir())  # writes a file
    except OSError as error:
        yield Problem(f"{error.strerror}; set TMPDIR", fatal=True)
        return
    yield from _space("temporary directory", path, "remove what was left there, or set TMPDIR")


def _space(what: str, path: Path, todo: str) -> Iterator[Problem]:
    try:
        disk = os.statvfs(path)
    except OSError as error:
        yield Problem(f"{what} {path}: {error.strerror}", fatal=True)
        return
    free = disk.f_bavail * disk.f_frsize
    if disk.f_files and not disk.f_favail:  # f_files is 0 where the file system does not count inodes
        yield Problem(f"{what} {path}: no inode is free; {todo}", fatal=True)
    elif free < _SPARSE:
        expected = f"{free // _MIB} MiB are free, expected {_SPARSE // _MIB}"
        yield Problem(f"{what} {path}: {expected}; {todo}", fatal=free < _FULL)


def _slow_names() -> str:
    return (
        f"the name server needs more than {_NAMES_LIMIT:.0f} s for this node's own address, and so does every "
        "connection of torch's store; RES_OPTIONS='timeout:1 attempts:1' bounds that, and a line "
        f"'::ffff:{_own_address()} {socket.gethostname()}' in /etc/hosts of all nodes ends it"
    )


def _own_address() -> str:
    return next((a for a in addresses.interface_addresses().values() if not a.startswith("127.")), "127.0.0.1")


def _names() -> Iterator[Problem]:
    """Look up this node's address as torch writes it. ``getnameinfo`` would stop all other threads meanwhile."""
    with contextlib.suppress(OSError):  # the name server knows no name, but has answered
        socket.gethostbyaddr(f"::ffff:{_own_address()}")
    yield from ()


def _gpus(granted: int, cuda_visible: str | None) -> Iterator[Problem]:
    try:
        listed = _nvidia_smi("--query-gpu=index,uuid,mig.mode.current")
        if any(mode == "Enabled" for _, _, mode in listed):
            return  # parts of GPUs were granted, which the list does not show
        wanted = None if cuda_visible is None else [name.strip() for name in cuda_visible.split(",")]
        ours = {
            uuid: index
            for index, uuid, _ in listed
            if wanted is None or any(name == index or (name[:4] == "GPU-" and uuid.startswith(name)) for name in wanted)
        }
        if len(ours) < granted:
            visible = f"{len(ours)} of the {granted} granted GPUs" if ours else f"none of the {granted} granted GPUs"
            yield Problem(
                f"{visible} can be seen (nvidia-smi lists {len(listed)}, CUDA_VISIBLE_DEVICES={cuda_visible}); "
                "look for Xid in dmesg, have this node drained",
                fatal=True,
            )
        if len(ours) != granted:
            return  # it is unknown which of the listed GPUs are granted
        deadline = time.monotonic() + _DYING
        while (busy := _foreign(ours)) and time.monotonic() < deadline:
            time.sleep(0.25)
    except OSError:
        yield Problem(f"{granted} GPUs were granted but no nvidia-smi can be run: they were not checked", fatal=False)
    except (subprocess.CalledProcessError, ValueError) as error:
        output = (error.stdout.strip() or str(error)).splitlines()[-1] if hasattr(error, "stdout") else str(error)
        yield Problem(f"nvidia-smi: {output}; expected {granted} GPUs, have this node drained", fatal=True)
    else:
        if busy:
            yield Problem(f"{'; '.join(busy)}: expected idle GPUs; end those processes", fatal=True)


def _foreign(ours: dict[str, str]) -> list[str]:
    apps = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name")
    return [
        f"GPU {ours[uuid]} is used by process {pid} ({name})"
        for uuid, pid, name in apps
        if uuid in ours and "nvidia-cuda-mps" not in name
    ]


def _nvidia_smi(query: str) -> list[tuple[str, str, str]]:
    """The rows of the answer, each of three fields; the last field may contain commas."""
    argv = ["nvidia-smi", query, "--format=csv,noheader"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    rows = [line.split(", ", 2) for line in done.stdout.splitlines() if line.strip()]
    if any(len(row) != 3 for row in rows):
        raise ValueError(next(", ".join(row) for row in rows if len(row) != 3))
    return [(a.strip(), b.strip(), c.strip()) for a, b, c in rows]


def _command(command: str, environ: Mapping[str, str] | None) -> Iterator[Problem]:
    output = os.memfd_create("preflight")
    try:
        argv = shlex.split(command)
        process = subprocess.Popen(
            argv, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        code = process.wait(COMMAND_LIMIT)
    except ValueError as error:
        yield Problem(f"--preflight {command!r}: {error}; expected a command line", fatal=True)
    except OSError as error:
        expected = "expected a command that is on every node"
        yield Problem(f"--preflight {command!r}: {error.strerror}; {expected}", fatal=True)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        yield Problem(f"--preflight {command!r}: not finished within {COMMAND_LIMIT:.0f} s", fatal=True)
    else:
        if code:
            size = os.lseek(output, 0, os.SEEK_END)
            lines = os.pread(output, 4096, max(0, size - 4096)).decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
            yield Problem(f"--preflight {command!r}: exit code {code}, expected 0: {last}", fatal=True)
    finally:
        os.close(output)
