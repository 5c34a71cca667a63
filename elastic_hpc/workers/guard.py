"""Kills what an agent leaves behind, and removes its FOLDER. Run by path, without torch, stdin from the agent:
``python -I -S guard.py TOKEN [SILENCE [FOLDER [PATIENCE]]]``. So this module imports nothing of the package, which is
then not on the path. An agent that ends a round kills its workers with ``kill_sessions``, and their child processes
with ``kill_all``, by the same mark.

When the agent is gone, however it died, its end of the pipe closes. The guard then kills every process that inherited
the agent's token in its environment: workers, in sessions of their own, and their child processes. It spares other
Slurm jobs that the workers submitted, which have inherited the token too and may share the node.

An agent that is frozen closes nothing. With ``SILENCE``, in seconds, the agent calls ``beat`` with every heartbeat, and
counts as frozen after that long without a beat: the guard kills the same processes, repeatedly, until the next
beat. After ``PATIENCE`` seconds without a beat the guard kills the agent too, because a frozen agent would keep the job
from ending. The guard waits for the first beat, and does not count the time in which it did not run itself.
"""

import contextlib
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


def beat(pipe: int) -> None:
    """Show the guard at the other end of ``pipe`` that this process is alive. Never waits, never raises."""
    with contextlib.suppress(OSError):  # full: the guard is behind; broken: it was killed
        os.set_blocking(pipe, False)
        os.write(pipe, b".")


def marked(token: bytes) -> list[int]:
    """Processes of this user that carry ``token`` in the environment they were started with. If this process is part of
    a Slurm job, without processes of other jobs.
    """
    here, found = os.environb.get(b"SLURM_JOB_ID"), []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/environ", "rb") as file:
                environ = b"\0" + file.read()
                if b"\0" + token in environ and (here is None or _job_of(environ) in {here, None}):
                    found.append(int(entry.name))
    return found


def _job_of(environ: bytes) -> bytes | None:
    """The Slurm job of a process: its own id, even for a task of an array."""
    _, name, rest = environ.partition(b"\0SLURM_JOB_ID=")
    return rest.partition(b"\0")[0] if name else None


def kill_marked(token: bytes, spared: "Collection[int]" = ()) -> list[int]:
    """Send SIGKILL to every process that carries ``token``, except in the sessions ``spared``. Returns their pids."""
    killed = []
    for pid in marked(token):
        with contextlib.suppress(OSError):
            if os.getsid(pid) not in spared:
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)
    return killed


def kill_sessions(sessions: "Collection[int]") -> None:
    """Send SIGKILL to every process in ``sessions``. A process may have lost the token: it was started with a clean
    environment, or has written a title of its own over its environment.
    """
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) in sessions:
                    os.kill(int(entry.name), signal.SIGKILL)


def kill_all(token: bytes, spared: "Collection[int]" = (), limit: float = 10.0) -> list[int]:
    """Call ``kill_marked`` until no such process is left, for at most ``limit`` seconds: a process may start others
    meanwhile, and a process that waits for a device dies only when the device answers. Returns the pids that are left.
    """
    deadline = time.monotonic() + limit
    while (left := kill_marked(token, spared)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def watch(token: bytes, limit: float, patience: float) -> None:
    """Return when the agent has closed the pipe. Kill the workers while the agent has been silent for ``limit``
    seconds, and the agent when it has been silent for ``patience`` seconds.
    """
    tick = max(0.1, min(limit / 8, 1.0))
    agent = os.pidfd_open(os.getppid())  # another process if the agent is dead already; then the pipe is closed
    poll = select.poll()
    poll.register(0, select.POLLIN)
    silence, beaten, ticked = 0.0, False, time.monotonic()
    while True:
        ready = poll.poll(tick * 1000 if beaten and limit < float("inf") else None)
        now = time.monotonic()
        if ready:
            if not os.read(0, 65536):
                return
            silence, beaten = 0.0, True
        elif beaten:
            silence += min(now - ticked, 2 * tick)  # without the time in which this process was frozen too
        ticked = now
        if silence >= limit:
            kill_marked(token)
        if silence >= patience:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(agent, signal.SIGKILL)


def main() -> None:
    token = b"ELASTIC_HPC_AGENT=" + sys.argv[1].encode() + b"\0"
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    limit, patience = (float(sys.argv[n]) if len(sys.argv) > n else float("inf") for n in (2, 4))
    watch(token, limit, patience)
    kill_all(token, limit=20)
    if len(sys.argv) > 3:
        import shutil  # noqa: PLC0415 - takes memory, and is needed only at the end

        shutil.rmtree(sys.argv[3], ignore_errors=True)


if __name__ == "__main__":
    main()
