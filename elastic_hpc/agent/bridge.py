"""The bridge between the two threads of an agent. The control thread runs the membership, accesses no file, and never
waits for the main thread. The main thread runs torch's agent, reads the leader's latest order, and reports what its
workers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from elastic_hpc.agent.threads import ThreadedReader, on_thread
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.membership import follower
from elastic_hpc.membership.hangs import NO_SIGNS, Signs
from elastic_hpc.membership.leader import STOP_TIMEOUT
from elastic_hpc.membership.messages import Failure, Order, Plan, State, Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.slow import NO_PACE, Pace
from elastic_hpc.network.channel import Link
from elastic_hpc.network.node import Transport
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.network.session import Membership
from elastic_hpc.record.endpoint import Published
from elastic_hpc.training.progress import Progress
from elastic_hpc.workers.ahead import Ahead

log = logging.getLogger(__name__)

_FILE_TIMEOUT = 0.5
"""Seconds to wait for a file of the run directory; a file system that stalls must not delay a take-over."""

_LOOK_EVERY = 0.05
"""Seconds between two looks at workers that are started ahead."""

_NO_PROGRESS = {"step": -1, "step_at": 0.0, "first": -1, "first_at": 0.0, "loss": None}
_NOT_KEPT = {"kept": 0, "not_kept": ""}
_BEFORE_A_ROUND: dict[str, Any] = {"listens": False, "live": False, "warm": 0, "cold": 0, "cold_why": ""}
_BEFORE_A_ROUND |= {**_NOT_KEPT, **_NO_PROGRESS, "signs": NO_SIGNS, "pace": NO_PACE}


@dataclass(frozen=True)
class Seat:
    """This node's place in a round that has just been formed."""

    round: int
    plan: Plan
    leader_addr: str
    """Address under which this node reaches the leader's host."""
    local_addr: str
    """This node's own address on that network."""


class Outside(Protocol):
    """The parts of the agent that the control thread uses (``leading.Leading``). ``find_leader`` and ``give_up`` may
    block, so they run on threads of their own.
    """

    def find_leader(self) -> Published | None: ...
    def give_up(self, roster: Roster | None, waited: float, why: str, **how: Any) -> JobEnded | None: ...
    def lead(self, promises: Promises, reason: str) -> LeaderServer: ...


class Control:
    """Keeps this agent connected to the leader. For the membership, on the control thread, it is the ``Node``."""

    def __init__(
        self,
        host: Host,
        nproc: int,
        network: Transport,
        outside: Outside,
        promises: Promises,
        *,
        heartbeat_timeout: float,
        join_timeout: float,
        first: bool,
        unfit: str = "",
        beat: Callable[[], None] = lambda: None,
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        """``unfit``: why this node should not take part. ``beat`` is called a few times per heartbeat timeout, as long
        as the control thread is alive. ``on_stuck`` is called on that thread when the main thread has not carried out
        an order of the leader within ``STOP_TIMEOUT``.
        """
        self._beat = beat
        self._on_stuck = on_stuck
        self._status = Status(0, host, nproc, unfit=unfit)
        self._outside = outside
        self._beat_interval = heartbeat_timeout / 5
        self._membership = Membership(
            host,
            self,
            network,
            promises,
            heartbeat_timeout=heartbeat_timeout,
            join_timeout=join_timeout,
            first=first,
        )
        self._order: Order | None = None
        self._addresses: tuple[str, str] | None = None
        """The addresses of the connection over which that order came: the leader's, and this node's own."""
        self._over: JobEnded | None = None
        self._published = ThreadedReader(outside.find_leader, _FILE_TIMEOUT)
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when a new order came."""

    # for the main thread

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def next_seat(self, ahead: Ahead | None = None) -> Seat:
        """Wait for a place in the next round; all of this node's workers must be dead or paused. Raises JobEnded.

        ``ahead`` starts workers meanwhile, if a world of live workers runs without this node.
        """
        preparing = ahead is not None and ahead.lacking
        while True:
            with self._changed:
                match self._step(workers=0):
                    case follower.Acknowledge(round):
                        idle: dict[str, Any] = {**_BEFORE_A_ROUND, "preparing": preparing}
                        idle["live"] = ahead is not None and ahead.waiting
                        self._report(state="idle", round=round, failure=None, drained=False, **idle)
                    case follower.Start(round, plan) if self._addresses:
                        self._status = replace(self._status, preparing=False)
                        return Seat(round, plan, *self._addresses)
                order = self._order
                if preparing != self._status.preparing:
                    self._report(preparing=preparing)
            if ahead:
                without = order is not None and order.stage == "run" and not order.plan
                preparing = ahead.look(wanted=without and order is not None and order.live)
            with self._changed:
                if self._order is order and preparing == self._status.preparing:
                    self._changed.wait(_LOOK_EVERY if preparing else None)

    def must_stop(self, round: int) -> str | None:
        """Why the workers of ``round`` must stop, or None if they may continue. Raises JobEnded."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        with self._changed:
            match self._step(workers=round):
                case follower.Stop(reason):
                    return reason
        return None

    @property
    def order(self) -> Order | None:
        """The leader's latest order."""
        return self._order

    def report(self, state: State, round: int, failure: Failure | None = None, *, drained: bool = False) -> None:
        """Report to the leader what the workers of ``round`` do."""
        with self._changed:
            changes: dict[str, Any] = {"state": state, "round": round, "failure": failure, "drained": drained}
            if state == "running":  # nothing is known about these workers yet
                changes |= _BEFORE_A_ROUND
            self._report(**changes)

    def report_progress(
        self, progress: Progress, *, live: bool = False, signs: Signs = NO_SIGNS, pace: Pace = NO_PACE
    ) -> None:
        """Report to the leader how far the workers are, whether they are ``live`` (``workers.lives``), what ``signs``
        of life they have given, and their ``pace``, with the next heartbeat; at once when they begin to listen, or to
        be live.
        """
        with self._changed:
            if (progress.listens, live) != (self._status.listens, self._status.live):
                self._report(listens=progress.listens, live=live)
            steps = {name: getattr(progress, name) for name in _NO_PROGRESS}
            self._status = replace(self._status, **steps, signs=signs, pace=pace)

    def report_start(self, *, kept: int, not_kept: str, warm: int, cold: int, why: str, standby_mb: float) -> None:
        """Report to the leader, with the next heartbeat, how the workers were started: ``kept`` of them in the previous
        round (``not_kept``: why another could not be kept), the others as in ``workers.standbys.Started``.
        """
        with self._changed:
            changes: dict[str, Any] = {"kept": kept, "not_kept": not_kept, "warm": warm, "cold": cold}
            self._status = replace(self._status, **changes, cold_why=why, standby_mb=standby_mb)

    def report_unfit(self, why: str) -> None:
        """Report to the leader that this node can no longer take part."""
        with self._changed:
            self._report(unfit=why)

    def on_signal(self) -> None:
        """This agent got SIGTERM. All agents of the allocation get a SIGTERM from Slurm, and the leader's agent acts
        for all of them. A joiner's job ends alone, so a joiner reports that it leaves.
        """
        if votes(self._status.node):
            self._call(self._membership.terminated)
        else:
            with self._changed:
                self._report(leaving="terminated")
        os.eventfd_write(self.wake_fd, 1)

    def close(self, timeout: float) -> None:
        """Leave; on the leader wait, at most ``timeout`` seconds, until all others have left."""
        self._call(self._membership.leave)
        self._thread.join(timeout)

    def _step(self, workers: int) -> follower.Wait | follower.Stop | follower.Acknowledge | follower.Start:
        if self._over:
            raise self._over
        step = follower.step(self._order, self._status, workers)
        if isinstance(step, follower.End):
            raise JobEnded(step.outcome, step.reason, logged=not step.alone)
        return step

    def _report(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        self._call(self._membership.send_status)

    def _call(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the control thread has ended
            if self._loop:
                self._loop.call_soon_threadsafe(act)

    # for membership, on the control thread

    def status(self) -> Status:
        return self._status

    def set_order(self, order: Order | None, link: Link | None) -> None:
        with self._changed:
            before = self._order
            news = (before and replace(before, seq=0)) != (order and replace(order, seq=0))
            self._order, self._addresses = order, (link.peer, link.local) if link else None
            self._changed.notify_all()
        if news:
            os.eventfd_write(self.wake_fd, 1)

    def ended(self, over: JobEnded) -> None:
        with self._changed:
            self._over = over
            self._changed.notify_all()
        os.eventfd_write(self.wake_fd, 1)

    async def published(self) -> Published | None:
        """See ``network.node.Node``. None if the file system answers with an error, or not in time."""
        try:
            return await self._published.read()
        except (ElasticError, OSError):
            return None

    async def give_up(
        self, roster: Roster | None, waited: float, why: str, *, patient: bool, others: Sequence[str]
    ) -> JobEnded | None:
        try:
            return await on_thread(
                self._outside.give_up, roster, waited, why, patient=patient, others=others, is_led=self._is_led
            )
        except (ElasticError, OSError) as error:
            log.warning("%s; trying again", error)
            return None

    def _is_led(self) -> bool:
        order = self._order
        return order is not None and order.leads

    def lead(self, promises: Promises, reason: str) -> LeaderServer:
        return self._outside.lead(promises, reason)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # a bug here must not leave the main thread waiting forever
            log.exception("the control thread failed")
            self.ended(JobEnded("lost", f"the control thread failed: {error}"))
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        beating = asyncio.ensure_future(self._keep_beating())
        await self._membership.run()
        beating.cancel()

    async def _keep_beating(self) -> None:
        stuck = 0.0
        while True:
            self._beat()
            await asyncio.sleep(self._beat_interval)
            # counts intervals, so that the time in which this process was frozen does not count
            stuck = stuck + self._beat_interval if self._waits_for_main_thread() else 0.0
            if stuck > STOP_TIMEOUT:
                self._on_stuck()

    def _waits_for_main_thread(self) -> bool:
        """Whether the main thread has to stop the workers, acknowledge that they have stopped, or leave. A main thread
        that has reported this node unfit only waits for the end of the job.
        """
        status = self._status
        if status.unfit:
            return False
        step = follower.step(self._order, status, status.round if status.state != "idle" else 0)
        return isinstance(step, (follower.Stop, follower.Acknowledge, follower.End))
