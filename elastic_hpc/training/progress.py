"""How far a training is, reported by its script. Each worker writes a record of fixed size into its file
``progress.<LOCAL_RANK>``, in the folder ``ELASTIC_HPC_LOCAL_DIR`` where it meets its agent, and the agent reads the
file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from elastic_hpc.environment import is_of_another_job
from elastic_hpc.training import step_time

LOCAL_DIR = "ELASTIC_HPC_LOCAL_DIR"
STEP_LOG = "ELASTIC_HPC_STEP_LOG"
"""A folder, set by a rehearsal: rank 0 appends every step that it reports to ``steps.jsonl`` there."""
PROGRESS_FILE = "progress.{local_rank}"
_NOT_IN_PLACE = "not_in_place.{local_rank}"
WINDOW = 128
"""How many of the last steps each worker keeps the time of."""
_RECORD = struct.Struct("<qqqddd")  # step, flags, first step, loss, when the first step was reported, when the last
_COUNT, _TIME = struct.Struct("<q"), struct.Struct("<f")  # after it: how many steps were measured, and the last WINDOW
_TIMES = struct.Struct(f"<q{WINDOW}f")
_DRAINED, _LISTENS = 1, 2
_not_in_place: str | None = None


class Progress(NamedTuple):
    """What a worker has reported to its agent."""

    step: int
    """Number of steps done; -1 if the worker has reported none."""
    drained: bool
    """Whether ``drain_requested`` has returned True: a worker that ends then was drained, and has not finished."""
    listens: bool = False
    """Whether the worker calls ``drain_requested``."""
    first: int = -1
    """The first step that was reported, as a rule the step after that of the checkpoint; -1 for none."""
    loss: float | None = None
    first_at: float = 0.0
    """When ``first`` was reported, in seconds since the epoch."""
    step_at: float = 0.0
    """When ``step`` was reported, in seconds since the epoch."""


def read_progress(path: str | os.PathLike[str]) -> Progress | None:
    """The last report of the worker that writes ``path``; None without a report, or if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            step, flags, first, loss, first_at, step_at = _RECORD.unpack(file.read(_RECORD.size))
    except (OSError, struct.error):
        return None
    drained, listens = bool(flags & _DRAINED), bool(flags & _LISTENS)
    return Progress(step, drained, listens, first, loss if math.isfinite(loss) else None, first_at, step_at)


def read_times(path: str | os.PathLike[str]) -> tuple[int, tuple[float, ...]]:
    """How many steps the worker that writes ``path`` has measured, and what the last of them took before its first
    collective, at most ``WINDOW`` of them, in no order.
    """
    try:
        with open(path, "rb") as file:
            file.seek(_RECORD.size)
            count, *times = _TIMES.unpack(file.read(_TIMES.size))
    except (OSError, struct.error):
        return 0, ()
    return count, tuple(times[:count])


def report_progress(step: int, loss: float | None = None, *, own_seconds: float | None = None) -> None:
    """Tell the agent that ``step`` steps are done, and the ``loss``, if its value is on the host already. Takes
    microseconds. A report that cannot be written raises nothing.

    ``own_seconds``: what this rank took in the step before its first collective, so that a slow node is found.
    ``time_steps`` and ``live`` measure that themselves.
    """
    for seconds in step_time.next_step() if own_seconds is None else (float(own_seconds),):
        own_progress_file().took(seconds)
    value = None if loss is None else float(loss.detach() if hasattr(loss, "detach") else loss)  # torch warns without
    own_progress_file().step(operator.index(step), math.nan if value is None else value)
    if (log := _step_log()) is not None:
        line = {"time": time.time(), "step": operator.index(step), "loss": value}
        with contextlib.suppress(OSError):
            how = {"listens": own_progress_file().listens, "not_in_place": _not_in_place}
            os.write(log, (json.dumps({**line, **how, **_world_of_launcher()}) + "\n").encode())


def meeting_folder() -> str | None:
    """Where this process meets its agent; None if it has none."""
    return None if is_of_another_job(os.environ) else os.environ.get(LOCAL_DIR)


@functools.cache
def own_progress_file() -> ProgressFile:
    return ProgressFile(meeting_folder(), os.environ.get("LOCAL_RANK", "0"))


def listen() -> None:
    """Tell the agent that this worker obeys ``drain.is_told_to_drain``, for a launcher that does so for its script."""
    own_progress_file().listen()


def mark_drained() -> None:
    """Tell the agent that this worker, when it ends now, was drained rather than finished."""
    own_progress_file().mark_drained()


def note_in_place(why_not: str) -> None:
    """Tell the agent and the step log: this worker has called ``live``, and can continue in place unless there is a
    ``why_not``.
    """
    global _not_in_place  # noqa: PLW0603 - of the process, as the step log is
    _not_in_place = why_not
    if why_not and (folder := meeting_folder()):
        with contextlib.suppress(OSError):
            Path(folder, _NOT_IN_PLACE.format(local_rank=os.environ.get("LOCAL_RANK", "0"))).write_text(why_not)


def why_not_in_place(folder: str, local_rank: int) -> str:
    """What a worker has told by ``note_in_place``; empty if it can continue in place, or has not called ``live``."""
    with contextlib.suppress(OSError, ValueError):
        return Path(folder, _NOT_IN_PLACE.format(local_rank=local_rank)).read_text()
    return ""


def forget_round() -> None:
    """A worker that is kept enters another round: the folder, the rank and the step log are others."""
    own_progress_file().close()
    own_progress_file.cache_clear()
    if (log := _step_log()) is not None:
        os.close(log)
    _step_log.cache_clear()


class ProgressFile:
    """The file by which a worker tells its agent how far it is; without ``folder`` there is no agent, and no file."""

    def __init__(self, folder: str | None, local_rank: str) -> None:
        self._path = os.path.join(folder, PROGRESS_FILE.format(local_rank=local_rank)) if folder else None
        self._descriptor: int | None = None
        self._step = self._first = -1
        self._loss = math.nan
        self._first_at = self._step_at = 0.0
        self._measured = 0
        self._record = bytearray(_RECORD.size + _TIMES.size)
        self.listens = self.drained = False

    def step(self, step: int, loss: float = math.nan) -> None:
        """See ``report_progress``."""
        self._step, self._loss, self._step_at = step, loss, time.time()
        if self._first < 0:
            self._first, self._first_at = step, self._step_at
        self._write()

    def took(self, seconds: float) -> None:
        """A step was measured. Is written with the next report."""
        if 0 <= seconds < math.inf:
            at = _RECORD.size + _COUNT.size + self._measured % WINDOW * _TIME.size
            _TIME.pack_into(self._record, at, min(seconds, 1e9))
            self._measured += 1
            _COUNT.pack_into(self._record, _RECORD.size, self._measured)

    @property
    def reported(self) -> int:
        """The step that was reported last; -1 for none."""
        return self._step

    def listen(self) -> None:
        self.listens = True
        self._write()

    def mark_drained(self) -> None:
        self.drained = True
        self._write()

    def close(self) -> None:
        """The round is over: nothing more is reported."""
        self._path = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            flags = _DRAINED * self.drained | _LISTENS * self.listens
            record = self._step, flags, self._first, self._loss, self._first_at, self._step_at
            _RECORD.pack_into(self._record, 0, *record)
            os.pwrite(self._descriptor, self._record if self._measured else self._record[: _RECORD.size], 0)


@functools.cache
def _step_log() -> int | None:
    """The descriptor of the step log; None if no steps are to be logged, or not by this rank."""
    folder = os.environ.get(STEP_LOG)
    if not folder or os.environ.get("RANK", "0") != "0":
        return None
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(os.path.join(folder, "steps.jsonl"), flags, 0o600)
    return None


def _world_of_launcher() -> dict[str, Any]:
    """``run`` is the job's id."""
    numbers = {"round": "ELASTIC_HPC_ROUND", "world_size": "WORLD_SIZE"}
    world = {name: int(os.environ.get(variable, "1")) for name, variable in numbers.items()}
    return {"run": os.environ.get("TORCHELASTIC_RUN_ID", ""), **world}
