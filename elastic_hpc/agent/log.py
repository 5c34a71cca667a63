"""The agent's own log: on stderr, which srun copies, and in a file, because srun may be lost with the first node."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import logging.handlers
import os
import queue
import time
from pathlib import Path

from elastic_hpc.agent.threads import within
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.workers.output import Destination, LogFile, Terminal

_LOG_TIMEOUT = 5.0
"""Seconds that a leaving agent has to write the last lines of its log."""


class AgentLog:
    """Receives the log records of this process. No thread that logs waits for a stalled stderr or file system: records
    go through a queue to a thread that formats them, and from there to a thread for each destination.
    """

    def __init__(self, rundir: RunDir, env: AgentEnv) -> None:
        path = rundir.path / "logs" / f"{env.run}.agent-{env.name}.log"
        form = logging.Formatter(f"%(asctime)s elastic_hpc[{env.name}]: %(message)s", "%H:%M:%S")
        self._destinations: list[Destination] = [Terminal(2), _AgentLogFile()]
        records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._listener = logging.handlers.QueueListener(
            records, *(_ToDestination(destination, path, form) for destination in self._destinations)
        )
        self._listener.start()
        for name in ("elastic_hpc", "asyncio"):  # asyncio logs exceptions of callbacks and tasks
            log = logging.getLogger(name)
            log.addHandler(_ToListener(records))
            log.setLevel(logging.INFO)
            log.propagate = False
        logging.raiseExceptions = False  # a record that cannot be formatted would be reported where it is logged

    def close(self) -> None:
        """Write what was logged, as far as that succeeds within ``_LOG_TIMEOUT``."""
        end = time.monotonic() + _LOG_TIMEOUT
        within(_LOG_TIMEOUT, self._listener.stop)
        for destination in self._destinations:
            destination.close(end - time.monotonic())


class Stderr(io.TextIOBase):
    """The stderr of agents and of the commands that the batch script calls. Text that cannot be written is dropped
    without an error: the job's output file may be on a full disk, and no requeue must fail because of that.
    """

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self.fileno(), text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        return 2


class _ToListener(logging.handlers.QueueHandler):
    """Leaves the formatting of tracebacks to the listener, because that reads source files."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        return record


class _ToDestination(logging.Handler):
    def __init__(self, destination: Destination, path: Path, form: logging.Formatter) -> None:
        super().__init__()
        self._destination, self._path = destination, path
        self.setFormatter(form)

    def emit(self, record: logging.LogRecord) -> None:
        self._destination.put(self._path, f"{self.format(record)}\n".encode(errors="replace"))


class _AgentLogFile(LogFile):
    _interval = 0.0

    def _note(self, lost: int, _following: bytes) -> bytes:
        return f"elastic_hpc: {lost} bytes are left out here, as the run directory could not be written\n".encode()
