"""How long this rank takes in a step before its first collective: this shows a slow node, not nodes that wait."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from elastic_hpc.errors import UsageError

log = logging.getLogger(__name__)

_MOST = 16
"""The number of steps by which a GPU may be behind."""

_own: StepTimer | None = None
"""The timer of a script that calls ``time_steps``."""


def time_steps(model: Any) -> None:
    """Measure how long this rank takes in each step, by which the job finds a slow node: from one ``report_progress``
    until the backward pass has computed the first gradient of ``model``, a DistributedDataParallel. Its collectives
    before that do not count. Call this once, before the first step. ``live`` measures without it. In a world of one
    rank there is nothing to measure, and ``model`` may be any model; otherwise raises UsageError for another model.
    """
    global _own  # noqa: PLW0603 - one for each process, like the file of its reports
    model = getattr(model, "_orig_mod", model)  # unwraps torch.compile
    parallel = sys.modules.get("torch.nn.parallel")
    if not (parallel and isinstance(model, parallel.DistributedDataParallel)):
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return
        raise UsageError(f"time_steps: expected a DistributedDataParallel, not a {type(model).__name__}")
    _own = timer = StepTimer(model.module)
    if any(True for _ in model.module.buffers()):  # ranks may wait for rank 0, which sends its buffers
        model.register_forward_pre_hook(_Hook(timer.pause))
        model.module.register_forward_pre_hook(_Hook(timer.resume))


class _Hook:
    """A hook of a module that the script may save: a loaded copy of the hook does nothing."""

    def __init__(self, call: Callable[[], None] | None = None) -> None:
        self._call = call

    def __call__(self, *_: Any) -> None:
        if self._call:
            self._call()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def next_step() -> list[float]:
    """Begin the next step. Returns the seconds of earlier steps, as far as known; none without ``time_steps``."""
    if _own is None:
        return []
    known = _own.known()
    _own.begin()
    return known


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """``time_steps`` does not count the time that this rank spends in the block."""
    if _own is None:
        yield
        return
    _own.pause()
    try:
        yield
    finally:
        _own.resume()


class StepTimer:
    """Measures the steps of ``module``. If a GPU computes, its events mark the moments: they are read after the GPU has
    reached them, so nothing waits for it. A step that cannot be measured, as in a CUDA graph, ends the measurement, but
    never the script.
    """

    def __init__(self, module: Any) -> None:
        self._parameter = next((each for each in reversed([*module.parameters()]) if each.requires_grad), None)
        self._moments: list[Any] = []
        """When the current step began, was paused and was resumed; empty while nothing is measured."""
        self._done: deque[list[Any]] = deque(maxlen=_MOST)
        if self._parameter is not None:
            try:
                self._parameter.register_post_accumulate_grad_hook(lambda _: self._end())
            except (RuntimeError, ValueError) as error:  # for example, of a lazy module
                self._give_up(error)

    def begin(self) -> None:
        """Begin a step, whether or not the previous step has ended."""
        self._moments = []
        if self._parameter is not None:
            self._note()

    def pause(self) -> None:
        """Stop counting: from now on this rank may wait for others."""
        if len(self._moments) % 2:
            self._note()

    def resume(self) -> None:
        if self._moments and len(self._moments) % 2 == 0:
            self._note()

    def known(self) -> list[float]:
        """The seconds of the steps whose times have become known since the last call."""
        found = []
        try:
            while self._done and all(isinstance(moment, float) or moment.query() for moment in self._done[0]):
                moments = self._done.popleft()
                found.append(sum(map(_between, moments[::2], moments[1::2])))
        except RuntimeError as error:
            self._give_up(error)
        return found

    def _end(self) -> None:
        """The first gradient is there, and collectives may begin."""
        self.pause()
        if self._moments:
            self._done.append(self._moments)
            self._moments = []

    def _note(self) -> None:
        """Note the current moment."""
        if not self._parameter.is_cuda:  # type: ignore[union-attr]
            self._moments.append(time.perf_counter())
            return
        cuda = sys.modules["torch"].cuda
        event = cuda.Event(enable_timing=True)
        try:
            event.record(cuda.current_stream(self._parameter.device))  # type: ignore[union-attr]
        except RuntimeError as error:
            self._give_up(error)
        else:
            self._moments.append(event)

    def _give_up(self, error: Exception) -> None:
        log.warning("the steps of this rank are not measured any more: %s", error)
        self._parameter, self._moments = None, []
        self._done.clear()


def _between(one: Any, other: Any) -> float:
    return float(other - one if isinstance(one, float) else one.elapsed_time(other) / 1000)
