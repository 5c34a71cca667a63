"""torch's ``LocalElasticAgent``, but waiting for events. Only this module depends on the internals of that class.

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
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

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
from elastic_hpc.membership.known import known_of
from elastic_hpc.membership.leader import STOP_TIMEOUT
from elastic_hpc.membership.messages import Failure
from elastic_hpc.membership.policy import TERM_GRACE, Policy
from elastic_hpc.training.departures import LEAVING_FILE, UNKNOWN
from elastic_hpc.training.drain import DRAIN_FILE
from elastic_hpc.training.progress import LOCAL_DIR, why_not_in_place
from elastic_hpc.workers import proc, stacks
from elastic_hpc.workers.drain import DrainSignals
from elastic_hpc.workers.failures import first_failure
from elastic_hpc.workers.handover import StandbyHandler
from elastic_hpc.workers.kernel_log import KernelLog
from elastic_hpc.workers.killing import could_not_kill, kill_workers
from elastic_hpc.workers.lives import Lives
from elastic_hpc.workers.logs import NodeLogs
from elastic_hpc.workers.memory import OomWatch
from elastic_hpc.workers.proc import exit_code
from elastic_hpc.workers.sides import LeaderConnection, Rendezvous
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
"""Seconds, after the workers' time to save, within which an agent that got SIGTERM gets the leader's verdict."""

_STACKS_TIMEOUT = 8.0
"""Seconds that recording the stacks of hung workers may take."""


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
        lives: Lives,
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
        self._lives = lives
        self._signals = signals
        self._strike = strike
        self._watch = Watch(hang_timeout, policy.heartbeat_timeout, lambda: logs.written)
        self._pidfds: dict[int, int] = {}
        """The pidfd of every worker of the round, by pid."""
        self._ended: set[int] = set()
        """The pidfds of the workers whose exit has woken this agent."""
        self._started_at = 0.0
        self._oom = OomWatch()
        self._kernel: KernelLog | None = None
        self._drain_passed_on = False
        """The listening workers of the round have been asked to save and stop."""
        self._pauses = False
        """They have been asked to pause instead, for a new world."""
        self._departure = 0
        """The time, as sent to them, at which this node will be taken away: see ``training.departures``; 0 for never.
        """
        self._received: tuple[SignalException, float] | None = None
        """The signal that this agent got while workers ran, and when."""
        self._given_up = False
        """Whether processes of this node could not be killed."""
        self._closing: threading.Thread | None = None
        """Reaps the workers of the previous round."""

    # signals to this agent

    def handle_signals(self) -> None:
        """Call this in the main thread whenever workers were started: torch then sets handlers of its own."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Slurm ends the job, or someone ends this agent."""
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
        self._oom, self._kernel = OomWatch(), KernelLog()
        self._drain_passed_on = self._pauses = False
        self._drain_came_at = 0.0
        self._departure = 0
        self._signals.begin()
        self._standbys.begin(self._lives.waiting)
        with StandbyHandler.used(self._lives, self._standbys):
            ids: dict[int, Any] = super()._start_workers(worker_group, *args, **kwargs)
        self.handle_signals()
        self._control.report("running", self._handler.round)
        self._pidfds, self._ended = {pid: os.pidfd_open(pid) for pid in ids.values()}, set()
        self._lives.begin(self._pidfds)
        self._watch.start(list(ids.values()))
        self._started_at = time.monotonic()
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup, *_args: Any, **_kwargs: Any) -> RunResult:
        """Sleep until a worker exits or the leader has news. Only the leader judges a failure: this agent reports it,
        and makes torch restart, which waits for the next round.
        """
        self._wait_for_news()
        if self._control.must_stop(self._handler.round):
            order = self._control.order
            if order and order.stacks:
                self._record_stacks()
            return self._stop_for_next_round()
        codes = {worker: self._exit_code(worker) for worker in worker_group.workers}
        failed = {worker: code for worker, code in codes.items() if code}
        failure = self._first_failure(failed) if failed else None
        drained = failure is not None and self._is_draining and (self._signals.sent or failure.collateral)
        if cause := self._broken() if failure is None or drained else failure:
            self._report_progress()
            self._control.report("failed", self._handler.round, cause)
            return self._stop_for_next_round()
        living = {worker.id for worker, code in codes.items() if code is None}
        if living and not (self._pauses and living <= self._lives.paused):
            self._look_after(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        if not living:
            self._kill_workers()  # processes that the workers left running
        self._report_progress()
        if failure:
            log.info("the drain ended %s", failure)
        drained = drained or self._signals.sent or self._watch.progress.drained or bool(living)
        self._control.report("succeeded", self._handler.round, drained=drained)
        self._wait_for_stop()  # raises JobEnded when all nodes have finished
        return self._stop_for_next_round()

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Kill the workers at once, as the workers of a broken round are stuck in a collective. Live workers pause
        instead, for the next round. Only after a signal to this agent, which Slurm sends to the workers too, do they
        get time to end.
        """
        leaving, began = sys.exc_info()[1], time.monotonic()
        if leaving:
            self._lives.discard("this agent leaves")
        else:
            self._keep_workers()
        if isinstance(leaving, SignalException):
            grace = int(min(TERM_GRACE, self._policy.grace))
            asking = threading.Thread(  # torch waits for killed workers without a limit
                target=super()._shutdown, args=args, kwargs={**kwargs, "timeout": grace}, daemon=True
            )
            asking.start()
            asking.join(grace + 1)
        spent = time.monotonic() - began
        self._kill_workers(leaving=isinstance(leaving, (JobEnded, SignalException)), spent=spent)
        if not self._lives.waiting:
            self._logs.finish()
        if self._kernel:
            self._kernel.close()
        context, self._pcontext = self._pcontext, None
        super()._shutdown(*args, **kwargs)
        if context:  # reaps the workers; the next round does not wait for that
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
        """Pass on a drain, report how far the workers are, and notice when they hang."""
        living = {w.id: self._pidfds[w.id] for w in worker_group.workers if self._exit_code(w) is None}
        self._announce_departure()
        if self._is_draining and not self._drain_passed_on and not self._is_between_loops(living.keys()):
            self._drain_passed_on = True
            self._pauses = self._is_for_new_world and living.keys() <= self._lives.connected
            if not self._pauses:
                Path(os.environ[LOCAL_DIR], DRAIN_FILE).touch()
        if self._pauses:
            self._lives.pause(now=False)  # repeated, as a worker may have begun its next loop meanwhile
        self._report_progress()
        listens = self._watch.progress.listens or self._pauses
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

    def _is_between_loops(self, living: Collection[int]) -> bool:
        """Whether live workers must pause, and have left a loop of ``live``: they can pause in their next loop. If no
        loop begins within half of the grace, they must save and stop.
        """
        if self._received or not (self._is_for_new_world and self._lives.were_live):
            return False
        ranks = range(self._worker_group.spec.local_world_size)
        if self._lives.connected.issuperset(living) or any(why_not_in_place(os.environ[LOCAL_DIR], r) for r in ranks):
            return False
        self._drain_came_at = self._drain_came_at or time.monotonic()
        return time.monotonic() - self._drain_came_at < self._policy.grace / 2

    def _announce_departure(self) -> None:
        """Announce to the workers whether this node is about to fail, or to be taken away."""
        order = self._control.order
        parting = order and next((each for each in order.wishes.partings if each.name == self._node), None)
        departure = int(parting.by or UNKNOWN) if parting else 0
        if departure != self._departure:
            self._departure = departure
            Path(os.environ[LOCAL_DIR], LEAVING_FILE).write_text(str(departure))

    def _report_progress(self) -> None:
        self._watch.look()
        progress = self._watch.progress
        live = bool(self._lives.connected)
        listens = progress.listens or self._signals.sent or (live and progress.step >= 0)  # not while the world forms
        signs, pace = self._watch.signs, self._watch.pace
        self._control.report_progress(progress._replace(listens=listens), live=live, signs=signs, pace=pace)
        steady = progress.step >= 0 or time.monotonic() - self._started_at > _STEADY
        self._standbys.look(going=steady and not self._drain_passed_on)
        started, lives = self._standbys.started, self._lives
        starts = {**vars(started), "warm": started.warm + lives.ahead}
        self._control.report_start(kept=lives.kept, not_kept=lives.not_kept, **starts)

    def _report_trouble(self, trouble: Trouble) -> None:
        """The workers hang or are stopped: have the leader end the round."""
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
        log.info("the workers hang; their stacks %s", f"are in {path}" if written else "could not be written")

    @property
    def _handler(self) -> Rendezvous:
        handler: Rendezvous = self._worker_group.spec.rdzv_handler
        return handler

    @property
    def _is_draining(self) -> bool:
        """Whether the workers of this round must save and stop."""
        order = self._control.order
        return order is not None and order.drain and order.round == self._handler.round

    @property
    def _is_for_new_world(self) -> bool:
        """Whether the workers of this round must continue in another world."""
        order = self._control.order
        return order is not None and order.new_world

    def _stop_for_next_round(self) -> RunResult:
        self._handler.restart_wanted = True
        return RunResult(state=WorkerState.HEALTHY)

    def _wait_for_stop(self) -> None:
        while not self._control.must_stop(self._handler.round):
            self._wait_for_news()

    def _wait_for_news(self) -> None:
        poll = select.poll()
        poll.register(self._control.wake_fd, select.POLLIN)
        pidfds = set(self._pidfds.values())
        for pidfd in pidfds - self._ended:  # including a worker that has ended since the last look
            poll.register(pidfd, select.POLLIN)
        for connection in self._lives.fds():
            poll.register(connection, select.POLLIN)
        events = poll.poll(1000 * max(0.0, min(1.0, self._lives.due - time.monotonic())))
        self._ended |= pidfds.intersection(descriptor for descriptor, _ in events)
        self._lives.look()

    def _first_failure(self, failed: Mapping[Worker, int]) -> Failure:
        kernel = self._kernel.news() if self._kernel else ()
        return first_failure(failed, self._node, self._pcontext, oom=self._oom.happened(), kernel=kernel)

    def _exit_code(self, worker: Worker) -> int | None:
        return exit_code(self._pidfds[worker.id])

    def _broken(self) -> Failure | None:
        """The failure of a live worker that is blocked or cannot continue: usually the echo of another rank's death."""
        if (found := self._lives.broken()) is None:
            return None
        worker = next(worker for worker in self._worker_group.workers if worker.id == found[0])
        where = self._node, worker.global_rank, worker.local_rank
        known = known_of([found[1]])
        name = known.name if known else ""
        return Failure("exception", *where, 1, found[1][:2000], time.time(), collateral=True, known=name)

    # the end of a round

    def _keep_workers(self) -> None:
        """Have the live workers pause, and keep the workers that do. Raises JobEnded if the job ends meanwhile."""
        if self._pcontext is None or self._given_up:
            return
        self._lives.look()
        self._lives.pause(now=True)
        while self._lives.are_pausing and not self._received:
            self._wait_for_news()
            self._control.must_stop(self._handler.round)
        self._lives.keep(self._pcontext.subprocess_handlers, os.environ[LOCAL_DIR])
        for pid in self._lives.waiting:
            os.close(self._pidfds.pop(pid))

    def _kill_workers(self, *, leaving: bool = False, spent: float = 0.0) -> None:
        """Kill the workers that are not kept, and all processes that they have started, within a time limit, of which
        ``spent`` seconds have passed. If processes are left after that, the agent gives this node up: it never has
        workers again, and waits for the end of the job unless it is ``leaving`` anyway.
        """
        if not self._pidfds or self._given_up:
            return
        limit = _LEAVE_TIMEOUT if leaving else _KILL_TIMEOUT - spent
        kept = self._lives.waiting
        spared = self._standbys.waiting | (proc.sessions_of(kept) if kept else set())
        if left := kill_workers(self._pidfds, self._mark, spared, limit):
            self._give_up(left, limit, leaving=leaving)

    def _give_up(self, left: list[int], limit: float, *, leaving: bool) -> None:
        self._given_up = True
        self._lives.discard("its node is given up")
        why = could_not_kill(left, limit)
        log.warning("%s: a GPU or a file system of this node may not answer; the job gives up the node", why)
        if leaving:
            if not all(map(proc.is_busy, left)):
                self._strike(why)
            return
        self._control.report_unfit(why)
        while not self._received:
            self._control.must_stop(self._handler.round)  # raises JobEnded when the job has ended
            self._wait_for_news()
        raise self._received[0]
