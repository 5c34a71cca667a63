"""Worlds of gloo processes on this machine; one program imports torch once and starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run(program: str, folder: Path, cases: Sequence[tuple[str, int]], timeout: float) -> list[list[str]]:
    """Run ``program`` with the arguments ``folder`` and, for each of ``cases``, its two parts and a free port. Returns
    the words of each line that the program prints.
    """
    held = [socket.create_server(("127.0.0.1", 0)) for _ in cases]
    words = [f"{how}:{number}:{port.getsockname()[1]}" for (how, number), port in zip(cases, held, strict=True)]
    for port in held:
        port.close()
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), *words],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines()]
