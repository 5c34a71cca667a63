"""For training scripts: which ranks are on nodes that are about to fail or to be taken away. All ranks get the same
answer.

The agent of such a node writes the file ``leaving`` into the folder that it shares with its workers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from dataclasses import dataclass

from elastic_hpc.errors import UsageError
from elastic_hpc.training.checkpoint import control_group
from elastic_hpc.training.progress import meeting_folder

LEAVING_FILE = "leaving"
"""Contains the time when the node will be taken away, in whole seconds since the epoch; ``UNKNOWN`` if no time was
announced, 0 if the node stays after all.
"""
UNKNOWN = 1


@dataclass(frozen=True)
class Leaving:
    """The ranks on nodes that are about to leave the job."""

    ranks: tuple[int, ...]
    by: float | None
    """When the first of these nodes will be taken away, in seconds since the epoch; None if no time was announced."""


def leaving(every: int = 1) -> Leaving | None:
    """Which ranks are on nodes that the site is about to take away, or that are about to fail; None if there are none.

    The job continues without such a node at the next step at which ``drain_requested`` is True, or ``live`` pauses, so
    a script need not call this. A script may want to save at once: a node stays if the job would otherwise have fewer
    than MIN nodes.

    All ranks get the same answer, and must call this at the same place. Only every ``every``-th call asks the other
    ranks, which costs a round trip among all ranks; the calls between repeat the last answer.
    """
    if every < 1:
        raise UsageError(f"leaving(every={every}): expected a number of calls, at least 1")
    return own_question().ask(every)


@functools.cache
def own_question() -> Question:
    return Question()


class Question:
    """The calls of ``leaving`` by one worker in one round."""

    def __init__(self) -> None:
        self._calls = 0
        self._answer: Leaving | None = None

    def ask(self, every: int) -> Leaving | None:
        self._calls += 1
        if self._calls % every == 0:
            self._answer = _ask()
        return self._answer


def _ask() -> Leaving | None:
    if (folder := meeting_folder()) is None:
        return None
    own, rank = _read(folder), 0
    moments = [own]
    if control := control_group():
        dist, group = control
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        # One number more than ranks: an all-reduce of fewer numbers may hang when a rank is lost (reform.py).
        torch = sys.modules["torch"]
        numbers = torch.zeros(size + 1, dtype=torch.int64, device="cpu")  # the script may have another default device
        numbers[rank] = own
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
        moments = numbers[:size].tolist()
    ranks = tuple(rank for rank, moment in enumerate(moments) if moment)
    return Leaving(ranks, min((moment for moment in moments if moment > UNKNOWN), default=None)) if ranks else None


def _read(folder: str) -> int:
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, LEAVING_FILE)) as file:
        return int(file.read())
    return 0
