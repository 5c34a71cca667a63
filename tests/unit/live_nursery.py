"""Forks workers from a process that has already imported torch, so that a test starts a worker in 0.1 s.

Run as a program, it is that process. It owns the socket to which the workers connect, as their agent would; the test
accepts the connections.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Forked:
    """A process that the nursery has started."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self._nursery.look()
        return self.returncode

    def wait(self, seconds: float = 30) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, f"process {self.pid} has not ended"
            self._nursery.look(0.1)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    def __init__(self, python: str) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        with other:
            self.process = subprocess.Popen(
                [python, __file__, str(other.fileno())], env=environ, pass_fds=[other.fileno()]
            )
        self._forked: dict[int, Forked] = {}

    def listen(self, listener: socket.socket) -> None:
        """Let the nursery call ``listen``, because a worker checks that its parent is the listening process."""
        socket.send_fds(self._socket, [b'{"do": "listen"}'], [listener.fileno()])
        assert json.loads(self._socket.recv(1 << 10))["listens"]

    def start(self, script: Path, environ: dict[str, str], output: int) -> Forked:
        message = json.dumps({"do": "fork", "script": str(script), "environ": environ}).encode()
        socket.send_fds(self._socket, [message], [output])
        while True:
            answer = json.loads(self._socket.recv(1 << 10))
            if "started" in answer:
                forked = self._forked[answer["started"]] = Forked(self, answer["started"])
                return forked
            self._heed(answer)

    def look(self, seconds: float = 0) -> None:
        while select.select([self._socket], [], [], seconds)[0]:
            self._heed(json.loads(self._socket.recv(1 << 10)))
            seconds = 0

    def _heed(self, answer: dict[str, int]) -> None:
        self._forked[answer["ended"]].returncode = answer["code"]

    def close(self) -> None:
        self._socket.close()
        self.process.wait(30)


def main() -> None:
    import torch._dynamo  # noqa: F401 - for the workers: an optimizer imports it at its first step

    import elastic_hpc.training.live_run  # noqa: F401

    test = socket.socket(fileno=int(sys.argv[1]))

    def ended() -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            test.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())

    while True:
        ended()
        if not select.select([test], [], [], 0.02)[0]:
            continue
        data, fds, _, _ = socket.recv_fds(test, 1 << 20, 1)
        if not data:
            return
        message = json.loads(data)
        if message["do"] == "listen":
            socket.socket(fileno=fds[0]).listen()
            test.send(b'{"listens": 1}')
            continue
        pid = os.fork()
        if pid:
            os.close(fds[0])
            test.send(json.dumps({"started": pid}).encode())
            continue
        test.close()
        os.environ.clear()
        os.environ.update(message["environ"])
        for number in (1, 2):
            os.dup2(fds[0], number)
        os.close(fds[0])
        sys.argv = [message["script"]]
        runpy.run_path(message["script"], run_name="__main__")
        return


if __name__ == "__main__":
    main()
