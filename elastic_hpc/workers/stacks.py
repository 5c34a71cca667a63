"""Where stuck processes are: their stacks by py-spy, or what the kernel knows. The processes need not cooperate."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_INSTALL = "pip install py-spy, in the environment of the job,"
_ALLOW = "sysctl kernel.yama.ptrace_scope=0, by an administrator,"


def dump(processes: Mapping[str, int], path: Path, *, timeout: float = 10.0) -> bool:
    """Write the stacks of all processes into the file ``path``. ``processes``: pid by name. Returns whether the file
    was written.

    Takes at most ``timeout`` seconds for all processes together. Never raises: a process may be gone or inaccessible,
    and the folder may not be writable.
    """
    deadline = time.monotonic() + timeout
    program = _py_spy()
    stacks = dict.fromkeys(processes, "")
    written = threading.Event()

    def look(name: str) -> None:
        stacks[name] = _stack(program, processes[name], deadline - 0.5)

    def write(text: str) -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(text)
            written.set()

    _run([threading.Thread(target=look, args=[name], name="stacks", daemon=True) for name in processes], deadline - 0.3)
    text = "\n".join(f"{name}\n{stack}" for name, stack in stacks.items() if stack)
    if text:
        _run([threading.Thread(target=write, args=[text], name="stacks", daemon=True)], deadline)
    return written.is_set()


def _run(threads: Sequence[threading.Thread], deadline: float) -> None:
    """Run ``threads``, and continue at the ``deadline`` without those that have not ended."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _stack(program: str | None, pid: int, deadline: float) -> str:
    if program is None:
        return f"{_kernel_view(pid)}\nFor the Python stack: {_INSTALL} shows it next time.\n"
    why = ""
    for options in ([], ["--nonblocking"]):  # py-spy cannot halt a process that is stopped already
        try:
            done = subprocess.run(
                [program, "dump", *options, "--pid", str(pid)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=max(0.1, (deadline - time.monotonic()) / (1 if options else 2)),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
            continue
        if done.returncode == 0 and "Thread " in done.stdout:
            return done.stdout
        why = " ".join(done.stderr.partition("Stack backtrace")[0].split()) or f"exit code {done.returncode}"
        if "permission denied" in why.lower():
            why = f"permission denied; {_ALLOW} allows it"
            break
    return f"{_kernel_view(pid)}\npy-spy could not read the Python stack: {why}\n"


def _kernel_view(pid: int) -> str:
    """The state of every thread, and the system call in which it waits."""
    command = " ".join(_read(f"/proc/{pid}/cmdline").replace("\0", " ").split())
    lines = [f"Process {pid}: {command[:300] or 'gone'}"]
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
            state = next(
                (line[6:].strip() for line in _read(task / "status").splitlines() if line[:6] == "State:"), "?"
            )
            call = _read(task / "syscall").split(" ")[0] or "?"  # "running", or the number of the system call
            lines.append(
                f"Thread {task.name} ({_read(task / 'comm').strip()}): {state}, "
                f"in {_read(task / 'wchan').strip('0 ') or '?'}, system call {call.strip()}"
            )
            if kernel := _read(task / "stack").strip():
                lines.append(kernel)
    return "\n".join(lines) + "\n"


def _read(path: str | Path) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""
