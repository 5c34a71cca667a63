"""An agent's end of the control connection, on a thread that touches no file and never waits for the main one.

The main thread, which torch's agent runs on, reads the leader's latest order and reports what its workers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from elastic_hpc import channel, member, protocol
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.protocol import Failure, Order, Plan, State, Status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaderAddress:
    """Where the leader of this run listens."""

    addresses: tuple[str, ...]
    port: int


@dataclass(frozen=True)
class Seat:
    """This node's place in a round that has just been formed."""

    round: int
    plan: Plan
    leader_addr: str
    """Address under which this node reaches the leader's host."""
    local_addr: str
    """This node's own address on that network."""


class Control:
    """Keeps this agent in touch with the leader; ``find_leader`` may block, ``lead`` runs beside it on the leader."""

    def __init__(
        self,
        status: Status,
        secret: Callable[[], bytes],
        find_leader: Callable[[], LeaderAddress | None],
        *,
        heartbeat_timeout: float,
        join_timeout: float,
        lead: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._status = status
        self._secret = secret
        self._find_leader = find_leader
        self._heartbeat_timeout = heartbeat_timeout
        self._patience = join_timeout
        self._lead = lead
        self._order: Order | None = None
        self._channel: channel.Channel | None = None
        self._over: JobEnded | None = None
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

    def next_seat(self) -> Seat:
        """Wait for a place in the next round; none of this node's workers may be alive. Raises JobEnded."""
        with self._changed:
            while True:
                match self._step(workers=0):
                    case member.Acknowledge(round):
                        self._report(state="idle", round=round, failure=None)
                    case member.Start(round, plan) if self._channel:
                        return Seat(round, plan, self._channel.peer, self._channel.local)
                self._changed.wait()

    def must_stop(self, round: int) -> str | None:
        """Why the workers of ``round`` may not go on, or None if they may. Raises JobEnded."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        with self._changed:
            match self._step(workers=round):
                case member.Stop(reason):
                    return reason
        return None

    def report(self, state: State, round: int, failure: Failure | None = None) -> None:
        """Tell the leader what the workers of ``round`` do."""
        with self._changed:
            self._report(state=state, round=round, failure=failure)

    def close(self, timeout: float) -> None:
        """Leave; on the leader wait, at most ``timeout`` seconds, until all others have left."""
        self._call(self._leave)
        self._thread.join(timeout)

    def _step(self, workers: int) -> member.Wait | member.Stop | member.Acknowledge | member.Start:
        if self._over:
            raise self._over
        what = member.step(self._order, self._status, workers)
        if isinstance(what, member.Leave):
            raise JobEnded(what.outcome, what.reason)
        return what

    def _report(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]
        self._call(self._send)

    def _call(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the thread has ended, there is nobody left to tell
            if self._loop:
                self._loop.call_soon_threadsafe(act)

    # on the control thread

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # a bug here must not leave the main thread waiting for ever
            log.exception("the control thread failed")
            self._end(JobEnded("lost", f"the control thread failed: {error}"))

    async def _main(self) -> None:
        self._loop, self._leaving = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        led = asyncio.ensure_future(self._lead()) if self._lead else None
        following = asyncio.ensure_future(self._follow())
        leaving = asyncio.ensure_future(self._leaving.wait())
        await asyncio.wait([following, leaving, *([led] if led else [])], return_when=asyncio.FIRST_COMPLETED)
        if led:
            if not led.done() and self._order is None:
                led.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await led
        await leaving
        following.cancel()

    async def _follow(self) -> None:
        """Stay connected. Returns when the leader has not been reached for too long."""
        reached = time.monotonic()
        tried, problem = "", ""
        while True:
            try:
                address = await asyncio.to_thread(self._find_leader)
                if address:
                    tried = f" at {' or '.join(address.addresses)} port {address.port}"
                    secret = await asyncio.to_thread(self._secret)
                    link = await channel.connect(address.addresses, address.port, secret)
                    problem = await self._session(link)
                    reached, self._patience = time.monotonic(), self._heartbeat_timeout
            except (OSError, ElasticError, asyncio.TimeoutError, protocol.ProtocolError) as error:
                problem = str(error) or type(error).__name__
            waited = time.monotonic() - reached
            if waited > self._patience:
                self._end(
                    JobEnded(
                        "lost",
                        f"the leader{tried or ' (it has not published its address)'} was not reached "
                        f"for {waited:.0f} s: {problem or 'is the run directory shared by all nodes?'}",
                    )
                )
                return
            await asyncio.sleep(random.uniform(0.05, 0.2))  # noqa: S311 - jitter

    async def _session(self, link: channel.Channel) -> str:
        """Follow the leader's orders until the connection ends; the answer says why it did."""
        with self._changed:
            self._channel = link
        self._heard = time.monotonic()
        beating = asyncio.ensure_future(self._beat(link))
        self._send()
        last = -1
        try:
            while True:
                order = protocol.decode_order(await link.read())
                self._heard = time.monotonic()
                if order.seq > last:
                    last = order.seq
                    self._set_order(order)
        except (OSError, protocol.ProtocolError) as error:
            return str(error) or type(error).__name__
        finally:
            beating.cancel()
            link.close()
            with self._changed:
                self._channel = None
            if not (self._order and self._order.stage == "end"):
                self._set_order(None)

    async def _beat(self, link: channel.Channel) -> None:
        interval = self._heartbeat_timeout / 5
        ticked = time.monotonic()
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            self._heard += max(0.0, now - ticked - 2 * interval)  # while this process was frozen nobody could be heard
            ticked = now
            if now - self._heard > self._heartbeat_timeout:
                link.close()
                return
            self._send()

    def _send(self) -> None:
        with self._changed:
            self._status = replace(self._status, seq=self._status.seq + 1)
            if self._channel:
                self._channel.send(self._status)

    def _set_order(self, order: Order | None) -> None:
        with self._changed:
            before = self._order
            news = (before and replace(before, seq=0)) != (order and replace(order, seq=0))
            self._order = order
            self._changed.notify_all()
        if news:
            os.eventfd_write(self.wake_fd, 1)

    def _end(self, over: JobEnded) -> None:
        with self._changed:
            self._over = over
            self._changed.notify_all()
        os.eventfd_write(self.wake_fd, 1)

    def _leave(self) -> None:
        if self._channel:
            self._channel.close()
        self._leaving.set()
