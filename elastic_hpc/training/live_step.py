"""One step of the loop of ``live``: an attempt at the step, whether the step is done, how its changes are undone, and
the question to all ranks, before the step, whether to stop.
"""

from __future__ import annotations

import ctypes
import operator
import random
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch

from elastic_hpc.training.drain import own_drain
from elastic_hpc.training.live_state import Buffers

_ASK_EVERY = 0.5
"""Seconds between two questions to all ranks whether to stop."""
_MOST_STEPS = 50
"""The most steps between two such questions: steps may become slower."""


class Attempt:
    """One attempt at a step: a ``with`` block, which gets the number of steps done before. Without a fault, the step is
    done when the block ends. A change of the world ends the block without an exception; then the next attempt is at
    the same step, unless all optimizers had stepped.
    """

    def __init__(self, begin: Callable[[], int], end: Callable[[BaseException | None], bool]) -> None:
        self._begin, self._end = begin, end
        self.entered = False

    def __enter__(self) -> int:
        self.entered = True
        return self._begin()

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        return self._end(error)


class Optimizers:
    """Counts how often each optimizer steps, to find out whether an interrupted step is done."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._begun = dict.fromkeys(map(id, optimizers), 0)
        self._ended = dict(self._begun)
        self._whole = {(1,) * len(optimizers)}
        """How often each optimizer stepped in the steps that are done; once each, before a step is done."""
        self._guessed = True
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._on_begin)
            optimizer.register_step_post_hook(self._on_end)

    def begin(self) -> None:
        """A step of the training begins."""
        for counts in (self._begun, self._ended):
            for key in counts:
                counts[key] = 0

    def end(self) -> None:
        """The step is done."""
        if self._guessed:
            self._guessed, self._whole = False, set()
        self._whole.add(tuple(self._ended.values()))

    def interrupted(self) -> tuple[bool, bool]:
        """Whether the interrupted step is done nevertheless, and whether it is half done."""
        counts = tuple(self._ended.values())
        more = [whole for whole in self._whole if all(map(operator.ge, whole, counts))]
        all_known = all(any(each) for each in zip(*self._whole, strict=True))  # else another may be about to step
        done = any(counts) and self._begun == self._ended and more == [counts] and all_known
        return done, not done and any(self._begun.values())

    def zero_grad(self) -> None:
        """Drop the gradients that an interrupted backward pass has left."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def _on_begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._begun[id(optimizer)] += 1

    def _on_end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._ended[id(optimizer)] += 1


class StepStart:
    """What a step changes before its optimizers step, as it was when the step began: the buffers of the model, such as
    batch norm's, the random number generators, and the scale of a GradScaler, which may skip the optimizer.
    """

    def __init__(self, net: torch.nn.Module, states: Iterable[Any]) -> None:
        self._buffers = Buffers(net, saved=True)  # the script can compute the other buffers
        self._noted: list[torch.Tensor] = []
        self._scalers = [of for of in states if isinstance(of, torch.amp.GradScaler)]
        self._numpy = _NumpyRandom()
        self._step = -1

    def begin(self, step: int) -> None:
        """Begin ``step``. If it began before, restore what it began with."""
        if step == self._step:
            self.put_back()
            return
        self._step = step
        self._note_buffers()
        self._scales = [scaler.state_dict() for scaler in self._scalers]
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._python = random.getstate()
        self._numpy.note()

    def put_back(self) -> None:
        """Undo the changes of a step that was interrupted before its optimizers stepped."""
        if self._buffers:
            torch._foreach_copy_(self._buffers.now, self._noted)
        for scaler, scale in zip(self._scalers, self._scales, strict=True):
            if scale and scaler._scale is not None:  # noqa: SLF001 - else nothing has been scaled
                scaler.update(scale["scale"])  # forgets that gradients were unscaled
                scaler.load_state_dict(scale)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
        random.setstate(self._python)
        self._numpy.put_back()

    def _note_buffers(self) -> None:
        if self._buffers:
            try:
                torch._foreach_copy_(self._noted, self._buffers.now)
            except RuntimeError:  # usually in the first step
                self._noted = [buffer.clone() for buffer in self._buffers.now]


class _NumpyRandom:
    """The state of numpy's global random numbers. numpy needs 60 us for a copy, so the last copy is kept as long as the
    memory of the generator does not change. That memory does not contain the second number of a normal pair: a script
    is not noticed that, at the end of a step, restores an earlier state which differs only in that number.
    """

    _SIZE = 625 * 4
    """Bytes of MT19937: 624 words, and the position of the next word."""

    def __init__(self) -> None:
        self._state: Any = None
        self._memory = b""

    def note(self) -> None:
        if (numpy := sys.modules.get("numpy.random")) is None:
            return
        generator: Any = getattr(numpy, "get_bit_generator", lambda: None)()  # since numpy 1.24
        known = isinstance(generator, numpy.MT19937)
        memory = ctypes.string_at(generator.ctypes.state_address, self._SIZE) if known else b""
        if memory and memory == self._memory and not self._state["has_gauss"]:  # no second number of a normal pair
            return
        self._state, self._memory = numpy.get_state(legacy=False), memory

    def put_back(self) -> None:
        if self._state is not None:
            sys.modules["numpy.random"].set_state(self._state)


class Asking:
    """Asks all ranks of a world whether to stop, about twice a second. All ranks ask at the same step: rank 0 sets the
    pace.
    """

    def __init__(self) -> None:
        self._in, self._every, self._asked = 1, 1, time.monotonic()

    def ask(self, *, leads: bool) -> bool:
        """Whether to stop. Call this in each step. ``leads``: this is rank 0."""
        self._in -= 1
        if self._in:
            return False
        now = time.monotonic()
        pace = int(_ASK_EVERY * self._every / max(now - self._asked, 1e-9))
        pace = max(1, min(pace, 2 * self._every, _MOST_STEPS))
        stop, self._every = own_drain().ask(pace if leads else 0)
        self._in, self._asked = self._every, now
        return stop
