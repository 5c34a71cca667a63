"""The progress of a training, as its script reports it. Each worker writes a record of fixed size into its file
``progress.<LOCAL_RANK>`` in ``ELASTIC_HPC_LOCAL_DIR``, the folder that it shares with its agent, and the agent reads
the file.
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
"""The number of last steps whose times a worker keeps."""
_RECORD = struct.Struct("<qqqddd")  # step, flags, first step, loss, when the first step was reported, when the last
_COUNT, _TIME = struct.Struct("<q"), struct.Struct("<f")  # then: number of measured steps, the last WINDOW times
_TIMES = struct.Struct(f"<q{WINDOW}f")
_DRAINED, _LISTENS = 1, 2
_not_in_place: str | None = None


class Progress(NamedTuple):
    """What a worker has reported to its agent."""

    step: int
    """Number of steps done; -1 if the worker has reported none."""
    drained: bool
    """Whether ``drain_requested`` has returned True: a worker that ends after that was drained, not finished."""
    listens: bool = False
    """Whether the worker calls ``drain_requested``."""
    first: int = -1
    """The first step that was reported, usually the step after the checkpoint; -1 for none."""
    loss: float | None = None
    """The loss that was reported with ``step``; None if there was none, or if it was not finite."""
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
    """How many steps the worker that writes ``path`` has measured, and the seconds that the last steps took before
    their first collective: at most ``WINDOW`` numbers, in no particular order.
    """
    try:
        with open(path, "rb") as file:
            file.seek(_RECORD.size)
            count, *times = _TIMES.unpack(file.read(_TIMES.size))
    except (OSError, struct.error):
        return 0, ()
    return count, tuple(times[:count])


def report_progress(step: int, loss: float | None = None, *, own_seconds: float | None = None) -> None:
    """Report to the agent that ``step`` steps are done, and the ``loss``, a number or a tensor with one element. Takes
    microseconds, but waits for the value of a tensor on a GPU. Raises nothing if the report cannot be written.

    ``own_seconds``: the seconds that this rank took in the step before its first collective, by which the job finds a
    slow node. ``time_steps`` and ``live`` measure these seconds themselves.
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
    """The folder that this process shares with its agent; None without an agent."""
    return None if is_of_another_job(os.environ) else os.environ.get(LOCAL_DIR)


@functools.cache
def own_progress_file() -> ProgressFile:
    return ProgressFile(meeting_folder(), os.environ.get("LOCAL_RANK", "0"))


def listen() -> None:
    """Report to the agent that this worker checks ``drain.is_told_to_drain``: a launcher does, for its script."""
    own_progress_file().listen()


def mark_drained() -> None:
    """Report to the agent that this worker, if it ends now, was drained and has not finished."""
    own_progress_file().mark_drained()


def note_in_place(why_not: str) -> None:
    """Record, for the agent and the step log, that this worker has called ``live``, and ``why_not`` it can continue in
    place; empty if it can.
    """
    global _not_in_place  # noqa: PLW0603 - one for each process, like the step log
    _not_in_place = why_not
    if why_not and (folder := meeting_folder()):
        with contextlib.suppress(OSError):
            Path(folder, _NOT_IN_PLACE.format(local_rank=os.environ.get("LOCAL_RANK", "0"))).write_text(why_not)


def why_not_in_place(folder: str, local_rank: int) -> str:
    """What a worker has recorded by ``note_in_place``; empty if it can continue in place or has not called ``live``."""
    with contextlib.suppress(OSError, ValueError):
        return Path(folder, _NOT_IN_PLACE.format(local_rank=local_rank)).read_text()
    return ""


def forget_round() -> None:
    """Begin another round in the same process: the folder, the rank and the step log change."""
    own_progress_file().close()
    own_progress_file.cache_clear()
    if (log := _step_log()) is not None:
        os.close(log)
    _step_log.cache_clear()


class ProgressFile:
    """The file in which a worker reports its progress to its agent. Without ``folder``, no agent and no file."""

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
        """Note that a step took ``seconds``. The next report writes it."""
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
        """Report nothing more: the round has ended."""
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
