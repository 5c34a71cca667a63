"""Kills what an agent leaves behind. Run by path, without torch: ``python -I -S guard.py TOKEN``, stdin from the agent.

When the agent is gone, however it died, its end of the pipe closes. Every process that inherited the agent's token in
its environment, workers in sessions of their own and what they started, is then killed.
"""

import contextlib
import os
import signal
import sys
import time


def marked(token: bytes) -> list[int]:
    """Processes of this user that carry ``token`` in the environment they were started with."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/environ", "rb") as environ:
                if token in environ.read():
                    found.append(int(entry.name))
    return found


def main() -> None:
    token = b"ELASTIC_HPC_AGENT=" + sys.argv[1].encode() + b"\0"
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (left := marked(token)):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
