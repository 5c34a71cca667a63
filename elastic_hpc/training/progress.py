"""For training scripts, and none of it is needed: learn of a drain, tell the progress, share a batch, checkpoints.

Without an agent, under plain torchrun or python, the same script runs: no drain is ever asked for, progress is told to
nobody, and checkpoints are not fenced. ``ELASTIC_HPC_LOCAL_DIR`` is where agent and workers of one node meet: the agent
makes the file ``drain`` there, each worker writes ``progress.<LOCAL_RANK>``. Importing this imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from elastic_hpc.environment import is_of_another_job
from elastic_hpc.errors import UsageError
from elastic_hpc.training.checkpoint import CheckpointError, Checkpoints, control_group, world
from elastic_hpc.training.checkpoint_folder import FencedOut

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "FencedOut",
    "Progress",
    "Share",
    "accumulation",
    "drain_requested",
    "read_progress",
    "report_progress",
]

LOCAL_DIR = "ELASTIC_HPC_LOCAL_DIR"
STEP_LOG = "ELASTIC_HPC_STEP_LOG"
"""A folder: there rank 0 appends every step that it reports to ``steps.jsonl``. A rehearsal asks for it."""
DRAIN_FILE = "drain"
PROGRESS_FILE = "progress.{local_rank}"
_RECORD = struct.Struct("<qqqddd")  # step, flags, first step, loss, when the first step was reported, when the last
_DRAINED, _LISTENS = 1, 2


class Progress(NamedTuple):
    """What a worker has told its agent."""

    step: int
    """Steps done; -1 if it has not said."""
    drained: bool
    """Whether ``drain_requested`` has returned True: if it ends now, it was drained rather than finished."""
    listens: bool = False
    """Whether it calls ``drain_requested`` at all."""
    first: int = -1
    """The first step that it has reported: one more than what its checkpoint had, -1 for none."""
    loss: float | None = None
    first_at: float = 0.0
    """When, in seconds since the epoch, it has reported the first step."""
    step_at: float = 0.0
    """When it has reported the last one."""


def read_progress(path: str | os.PathLike[str]) -> Progress | None:
    """What the worker that writes ``path`` told last; None if it has told nothing, or the file cannot be read."""
    try:
        with open(path, "rb") as file:
            step, flags, first, loss, first_at, step_at = _RECORD.unpack(file.read(_RECORD.size))
    except (OSError, struct.error):
        return None
    drained, listens = bool(flags & _DRAINED), bool(flags & _LISTENS)
    return Progress(step, drained, listens, first, loss if math.isfinite(loss) else None, first_at, step_at)


def report_progress(step: int, loss: float | None = None) -> None:
    """Tell the agent that ``step`` steps are done, and what the loss was, where that is known on the host already.
    Takes microseconds, and a failure is not worth an exception.
    """
    _worker().report(operator.index(step), math.nan if loss is None else float(loss))
    if (log := _step_log()) is not None:
        line = {"time": time.time(), "step": operator.index(step), "loss": None if loss is None else float(loss)}
        with contextlib.suppress(OSError):
            os.write(log, (json.dumps({**line, **_world_of_launcher()}) + "\n").encode())


def drain_requested(every: int = 1) -> bool:
    """Whether to save and end now, as the time is up, the job is preempted, or the user wants it; once True, ever True.

    The same answer on all ranks: call it at the same place on all of them, for example once a step. Only every
    ``every``-th call asks the others, which costs a round trip among all ranks; the calls between repeat its answer.
    Before ``init_process_group`` each rank has an answer of its own.
    """
    if every < 1:
        raise UsageError(f"drain_requested(every={every}): expected a number of calls, at least 1")
    return _worker().drain_requested(every)


def listen() -> None:
    """Tell the agent that this worker heeds ``is_told_to_drain``, for a launcher that does so for its script."""
    _worker().listen()


def is_told_to_drain() -> bool:
    """Whether the agent wants the workers of this node to save and stop; no other rank is asked."""
    return _worker().told


def mark_drained() -> None:
    """Tell the agent that this worker, when it ends now, was drained rather than finished."""
    _worker().mark_drained()


class Worker:
    """This process as its agent sees it; ``folder`` is where they meet, None if there is no agent."""

    def __init__(self, folder: str | None, local_rank: str) -> None:
        self._drain = os.path.join(folder, DRAIN_FILE) if folder else None
        self._progress = os.path.join(folder, PROGRESS_FILE.format(local_rank=local_rank)) if folder else None
        self._descriptor: int | None = None
        self._step = self._first = -1
        self._loss = math.nan
        self._first_at = self._step_at = 0.0
        self._calls = 0
        self._listens = False
        self._with_agents = True
        """Whether any rank has an agent; taken for granted until the ranks first talk."""
        self._terminated = False
        self._answer = False
        self._agreed = False
        """Whether all ranks have answered True; before there was a process group, one may have done so alone."""

    def drain_requested(self, every: int) -> bool:
        """See the function of this name."""
        self._calls += 1
        if self._calls == 1:
            self.listen()
            self._heed_sigterm()
        if self._agreed:
            return True
        control = control_group() if self._with_agents else None
        if self._calls % every:
            return self._answer and control is None
        told = self._answer or self._terminated or self.told
        if control:
            dist, group = control
            flags = sys.modules["torch"].tensor([int(told), int(self._drain is not None)])
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
            told, self._with_agents = map(bool, flags.tolist())
            self._agreed = told
        if told and not self._answer:
            self.mark_drained()
        return told

    @property
    def told(self) -> bool:
        """Whether the agent has asked."""
        return self._drain is not None and os.path.exists(self._drain)

    def listen(self) -> None:
        """See the function of this name."""
        self._listens = True
        self._write()

    def mark_drained(self) -> None:
        """See the function of this name."""
        self._answer = True
        self._write()

    def _heed_sigterm(self) -> None:
        """Slurm sends SIGTERM to workers too, at a preemption and scancel: for a script that listens that is a drain.
        A handler of the script's own is left alone, and so are processes that this one forks.
        """
        if self._drain is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return

        def on_sigterm(_signum: int, _frame: object) -> None:
            self._terminated = True

        def in_child() -> None:
            if signal.getsignal(signal.SIGTERM) is on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, on_sigterm)
        os.register_at_fork(after_in_child=in_child)

    def report(self, step: int, loss: float = math.nan) -> None:
        """See ``report_progress``."""
        self._step, self._loss, self._step_at = step, loss, time.time()
        if self._first < 0:
            self._first, self._first_at = step, self._step_at
        self._write()

    def _write(self) -> None:
        if self._progress is None:
            return
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._progress, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            flags = _DRAINED * self._answer | _LISTENS * self._listens
            record = self._step, flags, self._first, self._loss, self._first_at, self._step_at
            os.pwrite(self._descriptor, _RECORD.pack(*record), 0)


@functools.cache
def _worker() -> Worker:
    folder = None if is_of_another_job(os.environ) else os.environ.get(LOCAL_DIR)
    return Worker(folder, os.environ.get("LOCAL_RANK", "0"))


@functools.cache
def _step_log() -> int | None:
    """A descriptor; None where no steps are to be logged, or not by this rank."""
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


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch, in micro batches; all ranks have the same number of them."""

    slices: tuple[slice, ...]
    """Into the global batch. The last is never empty, unless the batch has fewer samples than there are ranks; an
    earlier one only if ``micro_batch`` is 1."""
    scale: float
    """For the *sum* of a micro batch's losses: then DDP's average over the ranks of what each has accumulated is the
    gradient of the mean over the global batch."""

    def micro_batches(self, model: Any) -> Iterator[slice]:
        """The slices, one after the other, for forward and backward; the ranks' gradients are averaged in the last.

        ``model`` may be a DistributedDataParallel or any other, which then has nothing to average.
        """
        for part in self.slices[:-1]:
            with getattr(model, "no_sync", contextlib.nullcontext)():
                yield part
        yield self.slices[-1]


def accumulation(
    global_batch: int, micro_batch: int, *, world_size: int | None = None, rank: int | None = None
) -> Share:
    """This rank's share of a batch of ``global_batch`` samples, at most ``micro_batch`` of them at a time.

    The shares of all ranks make up the batch, whatever the world size, and differ by one sample at most. ``world_size``
    and ``rank`` are those of the process group, unless only some ranks are replicas of each other.
    """
    if world_size is None or rank is None:
        rank, world_size = world()
    if global_batch < 1 or micro_batch < 1 or not 0 <= rank < world_size:
        raise UsageError(
            f"accumulation({global_batch}, {micro_batch}, {world_size=}, {rank=}): "
            "expected batches of at least 1 sample, and 0 <= rank < world_size"
        )
    count = -(-global_batch // world_size // micro_batch)  # twice rounded up: by the largest share
    begin, end = rank * global_batch // world_size, (rank + 1) * global_batch // world_size
    bounds = [begin + (end - begin) * i // count for i in range(count + 1)]
    return Share(tuple(map(slice, bounds[:-1], bounds[1:])), world_size / global_batch)
