"""The leader on the network: connections in, orders out. Runs on the control thread and never blocks it.

Files are written by the recorder's thread and stores are opened by ``open_store`` in a thread that can be abandoned,
so that a stalled file system or name server cannot keep the leader from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict

from elastic_hpc import channel, protocol
from elastic_hpc.leader import Leader
from elastic_hpc.recorder import Recorder

log = logging.getLogger(__name__)

LEAVE_TIMEOUT = 10.0
"""Seconds the agents get to take notice of the verdict before the leader leaves."""


class LeaderServer:
    """Serves ``leader`` on ``listener``. ``open_store(round)`` starts a store and answers with its port."""

    def __init__(
        self,
        leader: Leader,
        listener: socket.socket,
        secret: bytes,
        recorder: Recorder,
        open_store: Callable[[int], Future[int]],
    ) -> None:
        self._leader = leader
        self._listener = listener
        self._secret = secret
        self._recorder = recorder
        self._open_store = open_store
        self._opening: int | None = None
        self._channels: dict[int, channel.Channel] = {}
        self._next = 0
        self._strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Lead until every agent has left after the verdict."""
        loop = asyncio.get_running_loop()
        interval = self._leader.policy.heartbeat_timeout / 5
        server = await asyncio.start_server(self._serve, sock=self._listener, limit=protocol.MAX_LINE)
        try:
            self._after_input()
            saving: asyncio.Future[None] | None = None
            leave_at = float("inf")
            while not (saving and saving.done() and (not self._channels or loop.time() > leave_at)):
                wait = min(interval, max(0.01, self._leader.next_expiry + 0.001 - time.monotonic()))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)
                self._changed.clear()
                self._leader.on_tick(time.monotonic())
                self._after_input(beat=True)
                if self._leader.verdict and saving is None:
                    saving = asyncio.ensure_future(self._save())
                    saving.add_done_callback(lambda _: self._changed.set())
                elif saving and saving.done() and leave_at == float("inf"):
                    leave_at = loop.time() + LEAVE_TIMEOUT
        finally:
            server.close()
            for peer in self._channels.values():
                peer.close()

    async def _save(self) -> None:
        verdict = self._leader.verdict
        assert verdict is not None
        written = self._recorder.verdict(asdict(verdict))
        try:
            await asyncio.wait_for(asyncio.wrap_future(written), LEAVE_TIMEOUT)
        except (OSError, asyncio.TimeoutError) as error:
            log.warning("the verdict could not be written: %s", error or "the file system does not answer")
        self._leader.on_saved()
        self._after_input()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._next += 1
        conn = self._next
        try:
            peer = await channel.accept(reader, writer, self._secret)
        except (OSError, asyncio.TimeoutError, protocol.ProtocolError) as error:
            writer.transport.abort()
            self._strangers += 1
            if self._strangers <= 20:
                self._recorder.event(
                    "stranger", {"addr": str(writer.get_extra_info("peername")), "reason": repr(error)}
                )
            return
        self._channels[conn] = peer
        reason = "its connection was closed"
        try:
            while True:
                said = protocol.decode_status(await peer.read())
                if isinstance(said, protocol.Status):
                    self._leader.on_status(conn, peer.peer, said, time.monotonic())
                else:
                    self._leader.on_request(said, peer.peer, time.monotonic())
                self._after_input()
        except OSError:
            pass
        except protocol.ProtocolError as error:
            reason = f"it sent what this leader does not understand: {error}"
        finally:
            peer.close()
            self._channels.pop(conn, None)
            self._leader.on_lost(conn, reason, time.monotonic())
            self._after_input()
            self._changed.set()

    def _after_input(self, *, beat: bool = False) -> None:
        for name, fields in self._leader.take_events():
            self._recorder.event(name, fields)
            if name in {"round", "restart", "verdict"}:
                self._recorder.state(
                    round=self._leader.formed_round, restarts=self._leader.restarts, requeues=self._leader.requeues
                )
        for conn in self._leader.take_dropped():
            if conn in self._channels:
                self._channels[conn].close()
        for conn, order in self._leader.take_orders(beat=beat).items():
            if conn in self._channels:
                self._channels[conn].send(order)
        wanted = self._leader.wanted_store
        if wanted is not None and wanted != self._opening:
            self._opening = wanted
            task = asyncio.ensure_future(self._bring_store(wanted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._leader.verdict:
            self._changed.set()

    async def _bring_store(self, wanted: int) -> None:
        try:
            port = await asyncio.wrap_future(self._open_store(wanted))
        except Exception as error:  # noqa: BLE001 - whatever keeps a store from opening is told, and tried again
            self._recorder.event("store_failed", {"round": wanted, "reason": str(error)})
            await asyncio.sleep(1.0)
            self._opening = None
            return
        self._leader.on_store(wanted, port, time.monotonic())
        self._after_input()
