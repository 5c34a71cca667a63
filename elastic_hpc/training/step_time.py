"""How long this rank takes in a step before its first collective: by that its node is told from a node that waits."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic_hpc.errors import UsageError

_MOST = 16
"""Steps of which a GPU may be behind."""

_own: StepTimer | None = None
"""Of a script that calls ``time_steps``."""


def time_steps(model: Any) -> None:
    """Measure how long this rank takes in each step, from one ``report_progress`` until backward has the first gradient
    of ``model``, a DistributedDataParallel, so that a slow node is found. Collectives that DistributedDataParallel does
    before that do not count. To be called once, before the first step. ``live`` measures without it.
    """
    global _own  # noqa: PLW0603 - of the process, as the file is to which steps are reported
    parallel = sys.modules.get("torch.nn.parallel")
    if not (parallel and isinstance(model, parallel.DistributedDataParallel)):
        raise UsageError(f"time_steps: expected a DistributedDataParallel, not a {type(model).__name__}")
    _own = timer = StepTimer(model.module)
    if any(True for _ in model.module.buffers()):  # ranks may wait for rank 0, which sends them
        model.register_forward_pre_hook(lambda *_: timer.pause())
        model.module.register_forward_pre_hook(lambda *_: timer.resume())


def next_step() -> list[float]:
    """A step was reported. The times of steps that are known by now, of a script that calls ``time_steps``."""
    if _own is None:
        return []
    known = _own.known()
    _own.begin()
    return known


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """What this rank does meanwhile does not count in a step of a script that calls ``time_steps``."""
    if _own is None:
        yield
        return
    _own.pause()
    try:
        yield
    finally:
        _own.resume()


class StepTimer:
    """Measures the steps of ``module``. The moments are those of the GPU, if that computes: its events are read when it
    has come to them, so nothing waits for it.
    """

    def __init__(self, module: Any) -> None:
        self._parameter = next((each for each in reversed([*module.parameters()]) if each.requires_grad), None)
        self._moments: list[Any] = []
        """When the present step began, and when it was paused and resumed; empty while nothing is measured."""
        self._done: deque[list[Any]] = deque(maxlen=_MOST)
        if self._parameter is not None:
            self._parameter.register_post_accumulate_grad_hook(lambda _: self._end())

    def begin(self) -> None:
        """A step begins; what has become of the step before does not matter."""
        self._moments = [] if self._parameter is None else [self._now()]

    def pause(self) -> None:
        """From now on this rank may wait for others."""
        if len(self._moments) % 2:
            self._moments.append(self._now())

    def resume(self) -> None:
        if self._moments and len(self._moments) % 2 == 0:
            self._moments.append(self._now())

    def known(self) -> list[float]:
        """The times of the steps that have become known, in seconds."""
        found = []
        while self._done and (isinstance(self._done[0][-1], float) or self._done[0][-1].query()):
            moments = self._done.popleft()
            found.append(sum(map(_between, moments[::2], moments[1::2])))
        return found

    def _end(self) -> None:
        """The first gradient is there, and collectives may begin."""
        self.pause()
        if self._moments:
            self._done.append(self._moments)
            self._moments = []

    def _now(self) -> Any:
        if not self._parameter.is_cuda:  # type: ignore[union-attr]
            return time.perf_counter()
        event = sys.modules["torch"].cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(one: Any, other: Any) -> float:
    return float(other - one if isinstance(one, float) else one.elapsed_time(other) / 1000)
