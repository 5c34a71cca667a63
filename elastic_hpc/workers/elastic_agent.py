"""torch's ``LocalElasticAgent``, but it waits for events. Only this module depends on the internals of that class.

The methods overridden here are those that torch's documentation names as extension points; their signatures change
between releases, hence ``*args, **kwargs``. ``tests/unit/test_torch_contract.py`` fails when torch changes.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from elastic_hpc.errors import JobEnded
from elastic_hpc.membership.leader import STOP_TIMEOUT
from elastic_hpc.membership.messages import Failure, Order, Plan, State
from elastic_hpc.membership.policy import TERM_GRACE, Policy
from elastic_hpc.training.drain import DRAIN_FILE
from elastic_hpc.training.progress import LOCAL_DIR, Progress
from elastic_hpc.workers import guard, proc, stacks
from elastic_hpc.workers.drain import DrainSignals
from elastic_hpc.workers.failures import first_failure
from elastic_hpc.workers.handover import StandbyHandler
from elastic_hpc.workers.logs import NodeLogs
from elastic_hpc.workers.memory import OomWatch
from elastic_hpc.workers.proc import exit_code
from elastic_hpc.workers.standbys import Standbys
from elastic_hpc.workers.watch import Trouble, Watch

log = logging.getLogger(__name__)

_STEADY = 10.0
"""Seconds after which the next standbys are prepared, if the workers of the round report no steps."""

_KILL_TIMEOUT = STOP_TIMEOUT - 10
"""Seconds after which workers that were killed must be dead. The leader waits a little longer."""

_LEAVE_TIMEOUT = 8.0
"""The same when the job has ended: less than the leader waits for the agents to leave (``LEAVE_TIMEOUT``)."""

_VERDICT_TIME = 2.0
"""Seconds after the workers' time to save within which an agent that got SIGTERM hears the leader's verdict."""

_STACKS_TIMEOUT = 8.0
"""Seconds that recording the stacks of hung workers may take."""


class LeaderConnection(Protocol):
    """The agent's connection with the leader (``agent.bridge.Control``). ``must_stop`` raises JobEnded."""

    wake_fd: int
    """Readable when a new order has come."""

    @property
    def order(self) -> Order | None: ...
    def must_stop(self, round: int) -> str | None: ...
    def report(self, state: State, round: int, failure: Failure | None = None, *, drained: bool = False) -> None: ...
    def report_progress(self, progress: Progress, /) -> None: ...
    def report_start(self, *, warm: int, cold: int, why: str, standby_mb: float) -> None: ...
    def report_unfit(self, why: str) -> None: ...
    def on_signal(self) -> None: ...


class Rendezvous(Protocol):
    """The rendezvous handler of the agent (``agent.rendezvous``)."""

    restart_wanted: bool
    """To be set when the workers of the current round may not go on."""

    @property
    def round(self) -> int: ...
    @property
    def plan(self) -> Plan: ...


class ElasticAgent(LocalElasticAgent):
    """Runs one node's workers; the leader, through ``control``, says when they start and stop."""

    _pcontext: Any

    def __init__(
        self,
        spec: WorkerSpec,
        logs: NodeLogs,
        control: LeaderConnection,
        mark: bytes,
        node: str,
        policy: Policy,
        hang_timeout: timedelta | None,
        standbys: Standbys,
        signals: DrainSignals,
        strike: Callable[[str], None],
    ) -> None:
        """``mark``: the entry that all workers have in their environment. ``strike`` records why a requeue should avoid
        this node.
        """
        super().__init__(spec, logs_specs=logs)
        self._control = control
        self._logs = logs
        self._mark = mark
        self._node = node
        self._policy = policy
        self._standbys = standbys
        self._signals = signals
        self._strike = strike
        self._watch = Watch(hang_timeout, policy.heartbeat_timeout, lambda: logs.written)
        self._pidfds: dict[int, int] = {}
        """The pidfd of every worker of the round, by pid."""
        self._started_at = 0.0
        self._oom = OomWatch()
        self._drain_passed_on = False
        """The workers of the round that listen have been told to save and stop."""
        self._received: tuple[SignalException, float] | None = None
        """The signal that this agent got while workers ran, and when."""
        self._given_up = False
        """Whether processes of this node could not be killed."""
        self._closing: threading.Thread | None = None
        """Reaps the workers of the round before."""

    # signals to this agent

    def handle_signals(self) -> None:
        """To be called in the main thread, whenever workers were started: torch sets handlers of its own then."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Slurm ends the job, or somebody ends this agent."""
        number = signal.Signals(signum)
        leaving = SignalException(f"got {number.name}", number)
        if not self._pidfds:
            raise leaving
        if self._received is None:
            self._received = leaving, time.monotonic()
            self._control.on_signal()

    # extension points of torch's agent

    def _start_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> dict[int, Any]:
        # torch derives TORCHELASTIC_RESTART_COUNT from this agent's own remaining restarts; the job's count replaces it
        self._remaining_restarts = worker_group.spec.max_restarts - self._handler.plan.restart_count
        self._oom = OomWatch()
        self._drain_passed_on = False
        self._signals.begin()
        self._standbys.begin()
        with StandbyHandler.used(self._standbys):
            ids: dict[int, Any] = super()._start_workers(worker_group, *args, **kwargs)
        self.handle_signals()
        self._control.report("running", self._handler.round)
        self._pidfds = {pid: os.pidfd_open(pid) for pid in ids.values()}
        self._watch.start(list(ids.values()))
        self._started_at = time.monotonic()
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup, *_args: Any, **_kwargs: Any) -> RunResult:
        """Sleep until a worker exits or the leader has news. Only the leader judges a failure: this agent reports it,
        and tells torch to restart, which waits for the next round.
        """
        self._wait_for_news()
        if self._control.must_stop(self._handler.round):
            order = self._control.order
            if order and order.stacks:
                self._record_stacks()
            return self._stop_for_next_round()
        codes = {worker: self._exit_code(worker) for worker in worker_group.workers}
        failed = {worker: code for worker, code in codes.items() if code}
        failure = first_failure(failed, self._node, self._pcontext, oom=self._oom.happened()) if failed else None
        drained = failure is not None and self._is_draining and (self._signals.sent or failure.collateral)
        if failure and not drained:
            self._report_progress()
            self._control.report("failed", self._handler.round, failure)
            return self._stop_for_next_round()
        if None in codes.values():
            self._look_after(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        self._kill_workers()  # processes that the workers left running
        self._report_progress()
        if failure:
            log.info("the drain ended %s", failure)
        drained = drained or self._signals.sent or self._watch.progress.drained
        self._control.report("succeeded", self._handler.round, drained=drained)
        self._wait_for_stop()  # raises JobEnded when all nodes have finished
        return self._stop_for_next_round()

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Kill the workers at once, as those of a broken round are stuck in a collective. Only after a signal to this
        agent, which Slurm sends to the workers too, they have time to end.
        """
        leaving = sys.exc_info()[1]
        if isinstance(leaving, SignalException):
            grace = int(min(TERM_GRACE, self._policy.grace))
            asking = threading.Thread(  # torch waits for killed workers without end
                target=super()._shutdown, args=args, kwargs={**kwargs, "timeout": grace}, daemon=True
            )
            asking.start()
            asking.join(grace + 1)
        self._kill_workers(leaving=isinstance(leaving, (JobEnded, SignalException)))
        self._logs.finish()
        context, self._pcontext = self._pcontext, None
        super()._shutdown(*args, **kwargs)
        if context:  # reaps; the next round does not wait for that
            self._closing = threading.Thread(target=context.close, name="close", daemon=True)
            self._closing.start()
        if leaving and self._closing:
            self._closing.join(timeout=5)
        if leaving:
            self._logs.close(timeout=5)
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds = {}

    # while workers run

    def _look_after(self, worker_group: WorkerGroup) -> None:
        """Pass on a drain, report how far the workers are, and notice when they stand still."""
        if self._is_draining and not self._drain_passed_on:
            self._drain_passed_on = True
            Path(os.environ[LOCAL_DIR], DRAIN_FILE).touch()
        self._report_progress()
        living = {w.id: self._pidfds[w.id] for w in worker_group.workers if self._exit_code(w) is None}
        listens = self._watch.progress.listens
        if self._drain_passed_on and not listens:
            self._signals.tell(living, got=self._received[0].sigval if self._received else 0)
            self._report_progress()
        if self._received:
            leaving, received_at = self._received
            # An agent that leaves before the leader's verdict is a lost node.
            patience = min(TERM_GRACE, self._policy.grace) + _VERDICT_TIME if self._drain_passed_on else 1.0
            if time.monotonic() - received_at > patience:
                raise leaving
        elif trouble := self._watch.trouble():
            self._report_trouble(trouble)

    def _report_progress(self) -> None:
        self._watch.look()
        progress = self._watch.progress
        self._control.report_progress(progress._replace(listens=progress.listens or self._signals.sent))
        steady = progress.step >= 0 or time.monotonic() - self._started_at > _STEADY
        self._standbys.look(going=steady and not self._drain_passed_on)
        self._control.report_start(**vars(self._standbys.started))

    def _report_trouble(self, trouble: Trouble) -> None:
        """The workers stand still: have the leader end the round."""
        workers = self._worker_group.workers
        worker = next((worker for worker in workers if worker.id == trouble.pid), workers[0])
        if trouble.kind == "hang":
            self._record_stacks()
        failure = Failure(
            trouble.kind, self._node, worker.global_rank, worker.local_rank, 0, trouble.message, time.time()
        )
        self._control.report("failed", self._handler.round, failure)
        self._watch.stop()
        self._wait_for_stop()

    def _record_stacks(self) -> None:
        if self._watch.stacks_recorded:
            return
        self._watch.stacks_recorded = True
        pids = {f"rank{worker.global_rank}": worker.id for worker in self._worker_group.workers}
        path = self._logs.folder / f"{self._node}.stacks"
        written = stacks.dump(pids, path, timeout=_STACKS_TIMEOUT)
        log.info("the workers stand still; their stacks %s", f"are in {path}" if written else "could not be written")

    @property
    def _handler(self) -> Rendezvous:
        handler: Rendezvous = self._worker_group.spec.rdzv_handler
        return handler

    @property
    def _is_draining(self) -> bool:
        """Whether the workers of this round shall save and stop."""
        order = self._control.order
        return order is not None and order.drain and order.round == self._handler.round

    def _stop_for_next_round(self) -> RunResult:
        self._handler.restart_wanted = True
        return RunResult(state=WorkerState.HEALTHY)

    def _wait_for_stop(self) -> None:
        while not self._control.must_stop(self._handler.round):
            self._wait_for_news()

    def _wait_for_news(self) -> None:
        poll = select.poll()
        poll.register(self._control.wake_fd, select.POLLIN)
        for worker in self._worker_group.workers:
            if self._exit_code(worker) is None:
                poll.register(self._pidfds[worker.id], select.POLLIN)
        poll.poll(1000)

    def _exit_code(self, worker: Worker) -> int | None:
        return exit_code(self._pidfds[worker.id])

    def _kill_workers(self, *, leaving: bool = False) -> None:
        """Send SIGKILL to the workers and to all processes that they have started, and wait until all are dead, with a
        time limit: a process that waits for a GPU or a file system dies only when that answers. When the limit is over,
        this node is given up: the agent never has workers again, and waits for the end of the job unless it is
        ``leaving`` anyway.
        """
        if not self._pidfds or self._given_up:
            return
        limit = _LEAVE_TIMEOUT if leaving else _KILL_TIMEOUT
        deadline = time.monotonic() + limit
        guard.kill_sessions(self._pidfds)  # each worker leads a session
        left = set(guard.kill_all(self._mark, self._standbys.waiting, limit))
        for pid, pidfd in self._pidfds.items():
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                left.add(pid)
        if left:
            self._give_up(sorted(left), limit, leaving=leaving)

    def _give_up(self, left: list[int], limit: float, *, leaving: bool) -> None:
        self._given_up = True
        shown, more = ", ".join(map(proc.shown, left[:5])), f" and {len(left) - 5} more" if len(left) > 5 else ""
        why = f"could not be killed within {limit:g} s: {shown}{more}"
        log.warning("%s: a GPU or a file system of this node may not answer; the node is given up", why)
        if leaving:
            if not all(map(proc.is_busy, left)):
                self._strike(why)
            return
        self._control.report_unfit(why)
        while not self._received:
            self._control.must_stop(self._handler.round)  # raises JobEnded when the job has ended
            self._wait_for_news()
        raise self._received[0]
