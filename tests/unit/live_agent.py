"""Agents of workers in place, within the test process: real workers, a real socket, a
store for each round, no leader.
"""

from __future__ import annotations

import array
import contextlib
import json
import marshal
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from live_nursery import Forked, Nursery
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("live_script.py")


@contextlib.contextmanager
def trainings(nursery: Nursery, folder: Path) -> Iterator[Callable[..., Agents]]:
    """A function that starts a training: ``(SIZE, **options of Agents)``. All trainings end with the block."""
    with contextlib.ExitStack() as made:

        def start(size: int, **options: Any) -> Agents:
            agents = Agents(Path(tempfile.mkdtemp(dir=folder)), nursery, **options)
            made.callback(agents.close)
            agents.start(size)
            return agents

        yield start


class Worker:
    def __init__(self, process: Forked) -> None:
        self.process = process
        self.link: socket.socket | None = None
        self.said: list[dict[str, Any]] = []

    def last(self, what: str) -> dict[str, Any]:
        """The last message of this kind. Two threads of the worker send, so it need not be the last message of all."""
        return next(message for message in reversed(self.said) if message["is"] == what)

    def has_said(self, what: str) -> bool:
        return any(message["is"] == what for message in self.said)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Agents:
    """``options``: of the ``script``."""

    def __init__(self, folder: Path, nursery: Nursery, script: Path = SCRIPT, **options: Any) -> None:
        self.folder, self.nursery, self.script = folder, nursery, script
        self.folder.mkdir(exist_ok=True)
        self.record = folder / "record.jsonl"
        self.options = options
        self.round = 0
        self.workers: list[Worker] = []
        """The workers of the current round, by rank."""
        self.all: list[Worker] = []
        self._short = tempfile.mkdtemp()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{self._short}/live")
        nursery.listen(self._listener)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.store_apart = False
        """Whether the store of the next round runs in a process of its own, which a test can stop."""
        self.store: subprocess.Popen[bytes] | None = None
        self.outputs = (folder / "out").open("ab")

    # --- rounds -----------------------------------------------------------------------------------------------------

    def start(self, size: int, kept: list[Worker] | None = None) -> None:
        """Start the next round: the ``kept`` workers, which are paused, get the first ranks; the others are new."""
        kept = kept or []
        self.round += 1
        port = self.host_store()
        self.workers = []
        for rank in range(size):
            environ = self.environ(rank, size, port)
            if rank < len(kept):
                self.go(kept[rank], environ)
                self.workers.append(kept[rank])
            else:
                self.workers.append(Worker(self.nursery.start(self.script, environ, self.outputs.fileno())))
                self.all.append(self.workers[-1])

    def host_store(self) -> int:
        if not self.store_apart:
            self._near = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            return int(self._near.port)
        self.end_store()
        code = (
            "import torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False);"
            "print(s.port, flush=True); input()"
        )
        self.store = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.outputs
        )
        assert self.store.stdout is not None
        return int(self.store.stdout.readline())

    def end_store(self) -> None:
        if self.store is not None:
            self.store.kill()
            self.store.wait()
            self.store.stdin.close()
            self.store.stdout.close()
            self.store = None

    def environ(self, rank: int, size: int, port: int) -> dict[str, str]:
        folder = self.folder / str(self.round)
        folder.mkdir(exist_ok=True)
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "ELASTIC_HPC_"))},
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "RES_OPTIONS": "timeout:1 attempts:1",  # as the agent sets it: torch looks up all addresses
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ELASTIC_HPC_ROUND": str(self.round),
            "ELASTIC_HPC_LOCAL_DIR": str(folder),
            "ELASTIC_HPC_RUN_DIR": str(self.folder),
            "ELASTIC_HPC_FENCE": f"job.0.{self.round}",
            "ELASTIC_HPC_LIVE": f"{self._short}/live",
            "TORCHELASTIC_RESTART_COUNT": str(self.round - 1),
            "OPTIONS": json.dumps(self.options),
            "RECORD": str(self.record),
        }

    def go(self, worker: Worker, environ: dict[str, str]) -> None:
        memory = os.memfd_create("environ")
        os.write(memory, marshal.dumps(environ))
        fds = array.array("i", [self.outputs.fileno(), self.outputs.fileno(), memory])
        worker.said.clear()
        assert worker.link is not None
        worker.link.sendmsg([b'{"do": "go"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(memory)

    def pause(self, workers: list[Worker] | None = None, *, now: bool = True, seconds: float = 20) -> list[Worker]:
        """Pause the workers, and kill those that do not pause. Returns the paused workers."""
        asked = [worker for worker in (workers or self.workers) if worker.link]
        for worker in asked:
            worker.said = [message for message in worker.said if message["is"] != "paused"]
            try:
                worker.link.send(json.dumps({"do": "pause", "now": now}).encode())
            except OSError:
                continue
        self.until(lambda: all(w.has_said("paused") or not w.link for w in asked), seconds)
        kept = [worker for worker in asked if worker.link and worker.has_said("paused")]
        for worker in set(self.workers) - set(kept):
            worker.process.kill()
            worker.process.wait()
        return kept

    def again(self, size: int | None = None, *, now: bool = True) -> None:
        """Recover from a fault: the living workers pause and enter a new round."""
        kept = self.pause([worker for worker in self.workers if worker.alive], now=now)
        self.start(len(kept) if size is None else size, kept)

    # --- results ------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(self.report())
            self.look(0.01)

    def look(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                pid = int.from_bytes(data[:4], sys.byteorder)
                worker = next(worker for worker in self.all if worker.process.pid == pid)
                worker.link = connection
                self._selector.register(connection, selectors.EVENT_READ, worker)
                continue
            try:
                data = key.fileobj.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if data:
                key.data.said.append({**json.loads(data), "time": time.time()})
            else:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
                key.data.link = None

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def steps(self, pid: int | None = None) -> list[dict[str, Any]]:
        return [line for line in self.lines() if "step" in line and pid in {None, line["pid"]}]

    def at_step(self, step: int, seconds: float = 60) -> None:
        """Wait until all workers of the round have done ``step``."""
        pids = {worker.process.pid for worker in self.workers}

        def done() -> bool:
            there = {line["pid"] for line in self.steps() if line["step"] >= step and line["world"][3] == self.round}
            return there >= pids

        self.until(done, seconds)

    def ended(self, seconds: float = 60) -> list[int]:
        self.until(lambda: not any(worker.alive for worker in self.workers), seconds)
        return [worker.process.returncode for worker in self.workers]

    def report(self) -> str:
        self.outputs.flush()
        said = [(w.process.pid, w.process.poll(), w.said[-3:]) for w in self.workers]
        return f"{said}\n{self.lines()[-6:]}\n{(self.folder / 'out').read_text()[-6000:]}"

    def close(self) -> None:
        for worker in self.all:
            if worker.alive:
                worker.process.send_signal(signal.SIGCONT)
                worker.process.kill()
            worker.process.wait()
            if worker.link:
                worker.link.close()
        self.end_store()
        self._selector.close()
        self._listener.close()
        os.unlink(f"{self._short}/live")
        os.rmdir(self._short)
        self.outputs.close()
