"""The loop of ``live``: attempts at steps, and what happens between them and when the world changes."""

from __future__ import annotations

import atexit
import gc
import logging
import operator
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elastic_hpc.environment import LIVE, is_of_another_job
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.training import reform
from elastic_hpc.training.checkpoint import control_group
from elastic_hpc.training.drain import enter_round
from elastic_hpc.training.live_checkpoints import LiveCheckpoints
from elastic_hpc.training.live_link import LiveLink
from elastic_hpc.training.live_state import NEW, STEPPED, TORN, WHOLE, LiveModel, LiveStates, replica, sharded
from elastic_hpc.training.live_step import Asking, Attempt, Optimizers, StepStart
from elastic_hpc.training.progress import note_in_place, own_progress_file, report_progress
from elastic_hpc.training.step_time import StepTimer

log = logging.getLogger(__name__)

_FORMING = 12.0
"""Seconds within which a worker that forms a world notices a pause."""
_SAVING = 30.0
"""Seconds within which a worker that saves notices a pause: a sync to a busy disk cannot be interrupted."""
_HANGS = 4
"""How many checks in a row must find that the main thread hangs in a collective without any open connection."""


class TornError(ElasticError):
    """Every rank was interrupted after some of its optimizers had stepped, and before all had."""


class LiveRun:
    """A training that continues in place. See ``live``. ``optimizers``: others than those in ``states``."""

    _present: ClassVar[LiveRun | None] = None
    """The last run of this process."""

    def __init__(
        self,
        net: torch.nn.Module,
        states: Mapping[str, Any],
        checkpoint_every: int | None,
        folder: str | os.PathLike[str] | None,
        load: Callable[[], int | None] | None,
        wrap: Callable[[Any], Any] | None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self._net, self._wrap = net, wrap or self._distribute
        self._states = LiveStates(states)
        self._checkpoints = LiveCheckpoints(self._states, checkpoint_every, folder, load)
        registered = [of for of in states.values() if isinstance(of, torch.optim.Optimizer)]
        self._optimizers = Optimizers([*registered, *optimizers])
        self._start = StepStart(net, states.values())
        self._timer = StepTimer(net)
        self._has, self._over = NEW, 0
        self._began = self._longest = 0.0
        self._forming, self._failed = True, False
        self._link: LiveLink | None = None
        self.step = 0
        """How many steps are done."""
        self.stopped = False
        """Whether ``steps`` has ended early, because of a drain."""
        self.model = LiveModel(net)
        """The model to call in a step; the same object in all worlds."""
        self._modules = list(self.model.modules())
        self._modes: list[bool] = []
        """Whether each of ``_modules`` was in training mode when the step began."""
        self.world = reform.LiveWorld.now()
        """The ranks that train together. A fault or a growth changes this, so read it in each step."""
        self._stuck = 0
        self._cuda = cuda = any(parameter.is_cuda for parameter in net.parameters())
        self._group = reform.Group(lambda: self._link is not None and self._link.pausing, cuda=cuda)
        if LiveRun._present and LiveRun._present.is_linked:
            raise UsageError(
                "live: expected one run at a time in a process. For several networks: "
                "live(nn.ModuleDict({'a': a, 'b': b}), optimizer_a, optimizer_b, wrap=...)"
            )
        LiveRun._present = self
        why_not = self._connect(cuda=cuda)
        self._note(why_not)
        if why_not and "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        try:
            self._wait_for_place()
            self._enter()
        except Exception as error:
            if not self.is_interruption(error):
                raise
            self._join(error)

    def steps(self, until: int) -> Iterator[Attempt]:
        """Yields attempts at the next steps, until ``until`` steps are done or the job is drained. Reports each step to
        the agent, unless the script has reported it. All ranks leave the loop together; a worker that joins after that
        gets no attempt.
        """
        until = operator.index(until)  # the other ranks receive it as JSON
        if self._link:
            self._link.open()
        try:
            while until > self._over:
                if not self._go_on(lambda: self._between(until)):
                    continue
                if self.stopped or self.step >= until:
                    if self._go_on(self._finish):
                        self._over = self._over if self.stopped else until
                        return
                    continue
                attempt = Attempt(self.begin, self.end)
                yield attempt
                if not attempt.entered:
                    raise UsageError("for attempt in run.steps(...): expected `with attempt as step:` in the loop")
        except GeneratorExit:  # a break, or an error of the script: its collectives in the group may never end
            if not self._failed:
                atexit.register(self._close)
            raise
        finally:
            if self._link:
                self._link.close()

    def attempts(self) -> Iterator[Attempt]:
        """Yields attempts at one step, for a loop of other code, which may continue after a drain. The step may also
        end without a completed attempt, when this rank receives the result from another rank.
        """
        goal = self.step + 1
        while self.step < goal:
            if self._go_on(lambda: self._between(goal)):
                yield Attempt(self.begin, self.end)

    def finish(self) -> None:
        """Leave a loop of other code when all ranks do. If the world ends before, raises the reason."""
        self._finish()
        if self._link:
            self._link.close()

    def begin(self) -> int:
        """Begin an attempt; for ``Attempt``. Returns the number of steps done."""
        self._start.begin(self.step)
        self._modes = [module.training for module in self._modules]
        self._optimizers.begin()
        self._began = time.monotonic()
        self._timer.begin()
        return self.step

    def end(self, error: BaseException | None) -> bool:
        """End an attempt; for ``Attempt``. Returns whether ``error`` was handled."""
        if error is None:
            self._longest = max(self._longest, time.monotonic() - self._began)
            self._optimizers.end()
            self._done()
            return False
        if not self.is_interruption(error):
            self._failed = True
            return False
        for module, mode in zip(self._modules, self._modes, strict=True):
            module.training = mode  # an evaluation in the step may have been interrupted
        done, torn = self._optimizers.interrupted()
        if done:
            self._done()
            self._has = STEPPED
        else:
            self._start.put_back()
            self._has = TORN if torn else self._has
        self._join(error)
        return True

    def _connect(self, *, cuda: bool) -> str:
        """Connect to the agent. Returns why this worker cannot continue in place; empty if it can."""
        if LIVE not in os.environ or is_of_another_job(os.environ):
            return "no agent that keeps workers has started it"
        if dist.is_initialized():
            return "the script has called init_process_group before live"
        if obstacle := reform.obstacle(cuda=cuda):
            return obstacle
        try:
            self._link = LiveLink(os.environ[LIVE], self._free, self._patience)
        except OSError as error:
            return f"its agent cannot keep it: {error}"
        return ""

    @property
    def is_linked(self) -> bool:
        """Whether this worker can continue in place now."""
        return self._link is not None and self._link.is_open

    def _note(self, why_not: str) -> None:
        """Report to the agent and the user whether this worker can continue in place."""
        note_in_place(why_not)
        if why_not:
            (log.warning if LIVE in os.environ else log.info)("a fault restarts this worker: %s", why_not)

    def _free(self, *, now: bool, again: bool) -> None:
        """End the collectives of a world that has ended, or that is not complete yet."""
        if not (now or self._forming):
            return
        shut = self._group.shut(socket.SHUT_RDWR if again else socket.SHUT_RD, store=again)
        stuck = again and not shut and not self._forming and not self._cuda and reform.hangs()
        self._stuck = self._stuck + 1 if stuck else 0
        if self._stuck == _HANGS and self._link:
            self._link.cannot("gloo does not end a collective whose connections are closed")

    def _wait_for_place(self) -> None:
        """Wait for the first round, if this worker was started before its node had a place in a world."""
        if self._link and "RANK" not in os.environ:
            self._link.wait_for_place().take_over()
            enter_round()

    def _patience(self) -> float:
        """Seconds within which the main thread notices a pause."""
        return max(5.0, 3 * self._longest, _FORMING * self._forming, _SAVING * self._checkpoints.saving)

    def is_interruption(self, error: BaseException) -> bool:
        """Whether ``error`` comes from a change of the world, not from the script."""
        if self._link is None or not isinstance(error, Exception):
            return False
        if reform.is_of_the_group(error):
            return True
        return self._link.pausing and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)

    def _go_on(self, what: Callable[[], None]) -> bool:
        """Do ``what`` with all ranks. Returns False if the world has changed meanwhile: the caller must repeat it."""
        try:
            what()
        except Exception as error:
            if not self.is_interruption(error):
                raise
            self._join(error)
            return False
        return True

    def _join(self, error: Exception | BaseException) -> None:
        """Leave a world that has ended, because of ``error``, and enter the next world that can be formed."""
        assert self._link is not None
        while True:
            why = f"{type(error).__name__}: {error}"
            self._forming = True
            self._group.shut(socket.SHUT_WR)
            self._unwrap()
            self._net.zero_grad()
            self._optimizers.zero_grad()
            if not self._link.pausing:
                self._link.broken(why)
            self._link.stand_still(self.step).take_over()
            enter_round()
            try:
                self._enter()
            except Exception as next_error:
                if not self.is_interruption(next_error):
                    self._link.cannot(f"{type(next_error).__name__}: {next_error}")
                    raise
                error = next_error
            else:
                return

    def _enter(self) -> None:
        """Enter the world that the environment describes, with the state of the rank that has done the most steps."""
        self.world = reform.LiveWorld.now()
        own = self._has, self.step, self._over, *self._checkpoints.last
        reports = self._group.form(self.world, own) if self._link else [own]
        self._checkpoints.open(must=not any(has in {WHOLE, STEPPED} for has, *_ in reports))
        self._agree_on_state(reports)
        self.model.enter(self._wrap(self._net) if self.world.size > 1 else self._net)
        if why_not := sharded(self.model.wrapped):
            self._restart_because(why_not)
        self.stopped, self._asking = False, Asking()
        self._forming = False

    def _restart_because(self, why_not: str) -> None:
        """From now on a fault restarts this worker."""
        if self._checkpoints.every:
            raise UsageError(f"live(checkpoint_every=...): {why_not}; expected load=, and a script that saves itself")
        if self._link:
            self._note(why_not)
            self._link.close()
            self._link = None

    def _unwrap(self) -> None:
        reform.forget(self.model.wrapped)
        self.model.enter(self._net)

    def _agree_on_state(self, reports: Sequence[Any]) -> None:
        """``reports``: what each rank has; without an agent, what this rank has."""
        steps = [(step, has == WHOLE) if has in {WHOLE, STEPPED} else (-1, False) for has, step, *_ in reports]
        newest, whole = max(steps)
        if newest >= 0:
            source, rank = steps.index((newest, whole)), self.world.rank
            if self.world.size > 1 and (not whole or min(steps) < (newest, whole)):
                lacking = rank != source and (not whole or steps[rank] < (newest, whole))
                self.step = self._states.share(source, newest, lacking=lacking)
            self._over, *self._checkpoints.last = (max(report[which] for report in reports) for which in (2, 3, 4))
        elif any(has == TORN for has, *_ in reports):
            raise TornError("all ranks were interrupted while their optimizers stepped: no rank has a whole state")
        else:
            self.step = self._checkpoints.load()
            if self._link and self.world.size > 1 and (self._checkpoints.are_of_script or not self.step):
                self._states.share(0, self.step, lacking=self.world.rank > 0)  # as DistributedDataParallel does
        self._has = WHOLE

    def _distribute(self, net: torch.nn.Module) -> torch.nn.Module:
        return replica(net, self._timer) if self._link else DistributedDataParallel(net)

    def _done(self) -> None:
        self.step += 1
        for seconds in self._timer.known():
            own_progress_file().took(seconds)
        if own_progress_file().reported != self.step:
            report_progress(self.step)

    def _between(self, until: int) -> None:
        """What all ranks do between two steps."""
        if self._link and self._link.pausing:
            raise reform.Interrupted("a new world is to be formed")
        self._checkpoints.save_if_due(self.step)
        if self.step < until:
            self.stopped = self._asking.ask(leads=self.world.rank == 0)

    def _finish(self) -> None:
        """Save, and leave the loop when all ranks do."""
        self._checkpoints.save_last(self.step)
        if control := control_group():
            dist.barrier(group=control[1])
        atexit.register(self._close)

    def _close(self) -> None:
        """End the group before Python shuts down: its threads may abort then (pytorch issue 190489)."""
        self._unwrap()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
