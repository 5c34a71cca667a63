"""The leader on the network: what its agents say goes in, what they are told goes out. Never blocks.

Files are written by the recorder's thread, stores are opened in threads that can be abandoned, and Slurm is asked in
threads, so that a stalled file system or name server cannot keep the leader from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, Protocol

from elastic_hpc.membership import messages
from elastic_hpc.membership.growth import Needs
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import Leave, Request, Status
from elastic_hpc.membership.policy import Verdict
from elastic_hpc.membership.roster import Roster
from elastic_hpc.network.channel import Link

log = logging.getLogger(__name__)

BATCH_HOST = 0
"""Index of the node on which the batch script runs."""

LEAVE_TIMEOUT = 10.0
"""Seconds the agents get to take notice of the verdict before the leader leaves."""

_PASSES = 64
"""Passes of the loop after which is decided, though more arrives with each."""


class Record(Protocol):
    """Where the leader's record goes; ``recorder.Recorder``, or a list. No method blocks."""

    def publish(self) -> None: ...
    def beat(self) -> None: ...
    def event(self, name: str, fields: dict[str, Any]) -> None: ...
    def state(self, **state: int) -> None: ...
    def verdict(self, verdict: dict[str, Any]) -> Future[None]: ...


class Act(Protocol):
    """Does what a verdict asks for. ``lost`` are the names of lost nodes, ``alone``: the batch host is among them,
    ``others``: the names of the nodes that are left besides this one.
    """

    async def __call__(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None: ...


class Supplier(Protocol):
    """Brings the nodes that the leader could use (``agent.supply.Supply``)."""

    def need(self, needs: Needs) -> None: ...
    async def run(self, report: Callable[[Needs, int, int], None]) -> None:
        """Until it is cancelled. ``report(needs, starting, pending)`` says how many agents are starting, and for how
        many nodes Slurm was asked, in answer to ``needs``.
        """


class LeaderServer:
    """Serves ``leader``. ``open_store(round)`` starts a store and answers with its port; ``supply`` brings nodes."""

    def __init__(
        self,
        leader: Leader,
        record: Record,
        open_store: Callable[[int], Awaitable[int]],
        act: Act,
        supply: Supplier | None = None,
    ) -> None:
        self.leader = leader
        self.record = record
        self._open_store = open_store
        self._act = act
        self._supply = supply
        self._opening: int | None = None
        self._links: dict[int, Link] = {}
        self._next = 0
        self._strangers = 0
        self._passes = self._quiet = 0
        self._published = self._over = self._batch_host_is_lost = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> str:
        """Lead until every agent has left after the verdict, or until this leader abdicates; the answer says why it
        did, or is empty.
        """
        loop = asyncio.get_running_loop()
        interval = self.leader.policy.heartbeat_timeout / 5
        saving: asyncio.Future[list[str]] | None = None
        leave_at = float("inf")
        beat_at = 0.0
        supplying = self._supply and asyncio.ensure_future(self._supply.run(self._on_coming))
        try:
            self._after_input()
            while not (saving and saving.done() and (not self._links or loop.time() > leave_at)):
                due = min(beat_at, max(loop.time() + 0.01, self.leader.next_expiry + 0.001))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), max(0.0, due - loop.time()))
                self._changed.clear()
                now = loop.time()
                self.leader.on_tick(now)
                beat = now > beat_at - 0.001  # a timer may be early by what the clock cannot tell
                self._after_input(beat=beat)
                beat_at = now + interval if beat else beat_at
                if self.leader.abdicated:
                    return self.leader.abdicated
                if self.leader.leads:
                    self.record.beat()
                if self.leader.verdict and saving is None:
                    saving = asyncio.ensure_future(self._save(self.leader.verdict))
                    saving.add_done_callback(lambda _: self._changed.set())
                elif saving and saving.done() and leave_at == float("inf"):
                    leave_at = loop.time() + LEAVE_TIMEOUT
            verdict = self.leader.verdict
            if verdict and verdict.outcome == "requeue" and not self._batch_host_is_lost:
                # not left to the batch script: srun waits for lost nodes until Slurm notices, which may take minutes
                await self._do(verdict, saving.result(), alone=False, others=[])
            return ""
        finally:
            for task in (*self._tasks, *([supplying] if supplying else [])):
                task.cancel()
            for link in self._links.values():
                link.close()

    async def attend(self, link: Link, first: Status) -> None:
        """Listen to one agent until its connection ends."""
        self._next += 1
        conn = self._next
        self._links[conn] = link
        now = asyncio.get_running_loop().time
        reason = "its connection was closed"
        said: object = first
        try:
            while True:
                if isinstance(said, Status):
                    self.leader.on_status(conn, link.peer, said, now())
                elif isinstance(said, Roster):
                    self.leader.on_roster(said)
                self._decide_soon()
                said = messages.decode_from_agent(await link.read())
        except OSError:
            pass
        except messages.ProtocolError as error:
            reason = f"it sent what this leader does not understand: {error}"
        finally:
            link.close()
            self._links.pop(conn, None)
            self.leader.on_lost(conn, reason)
            self._decide_soon()
            self._changed.set()

    def _decide_soon(self) -> None:
        """When all that has arrived by now is in: a thousand agents that say something at once lead to one decision."""
        if self.leader.has_news:
            self._quiet = 0
            if not self._passes:
                self._look_for_more()

    def _look_for_more(self) -> None:
        """Without a wait: what lies in the sockets needs one pass of the loop to be read, and one to be understood."""
        loop = asyncio.get_running_loop()
        if self._quiet < 2 and self._passes < _PASSES:
            self._passes, self._quiet = self._passes + 1, self._quiet + 1
            loop.call_soon(self._look_for_more)
            return
        self._passes = 0
        self.leader.decide(loop.time())
        self._after_input()

    def on_request(self, request: Request | Leave, reason: str = "") -> None:
        """Somebody asks for a drain or the end, or to let a node go."""
        now = asyncio.get_running_loop().time()
        if isinstance(request, Leave):
            self.leader.on_leave(request.node, request.reason, now)
        else:
            self.leader.on_request(request, reason, now)
        self._after_input()

    def _on_coming(self, needs: Needs, starting: int, pending: int) -> None:
        self.leader.on_coming(needs, starting, pending, asyncio.get_running_loop().time())
        self._after_input()

    def on_stranger(self, addr: str, reason: str) -> None:
        """Somebody without the secret was refused."""
        self._strangers += 1
        if self._strangers <= 20:
            self.record.event("stranger", {"addr": addr, "reason": reason})

    async def _save(self, verdict: Verdict) -> list[str]:
        self._batch_host_is_lost = BATCH_HOST not in self.leader.peers.by_node
        actor = "agents" if self._batch_host_is_lost else "batch script"
        written = self.record.verdict({**asdict(verdict), "actor": actor})
        try:
            await asyncio.wait_for(asyncio.wrap_future(written), LEAVE_TIMEOUT)
        except (OSError, asyncio.TimeoutError) as error:
            log.warning("the verdict could not be written: %s", error or "the file system does not answer")
        lost = self.leader.peers.lost_names
        if self._batch_host_is_lost:
            # before anybody leaves: if this node dies now, the others act
            await self._do(verdict, lost, alone=True, others=self.leader.peers.names(without=self.leader.node))
        self.leader.on_saved()
        self._after_input()
        return lost

    async def _do(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None:
        try:
            await self._act(verdict, lost, alone=alone, others=others)
        except Exception:  # a fault here must not keep the agents, whose end the others may act upon
            log.exception("the verdict could not be acted upon")

    def _after_input(self, *, beat: bool = False) -> None:
        leader = self.leader
        if leader.has_led and not self._published:
            self._published = True
            self.record.publish()
        for name, fields in leader.take_events() if leader.has_led else ():
            self.record.event(name, fields)
            if name in {"round", "restart", "verdict"}:
                self.record.state(round=leader.roster.round, restarts=leader.restarts, requeues=leader.requeues)
        for conn in leader.take_dropped():
            if conn in self._links:
                self._links[conn].close()
        for conn, orders in leader.take_orders(beat=beat).items():
            if conn in self._links:
                self._links[conn].send(*orders)
        wanted = leader.wanted_store
        if wanted is not None and wanted != self._opening:
            self._opening = wanted
            task = asyncio.ensure_future(self._bring_store(wanted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._supply and (needs := leader.needs):
            self._supply.need(needs)
        if (leader.verdict or leader.abdicated) and not self._over:
            self._over = True
            self._changed.set()

    async def _bring_store(self, wanted: int) -> None:
        try:
            port = await self._open_store(wanted)
        except Exception as error:  # noqa: BLE001 - whatever keeps a store from opening is told, and tried again
            told = (str(error) or type(error).__name__).splitlines()[0]  # torch's own traceback may follow
            self.leader.on_store_failed(wanted, told, asyncio.get_running_loop().time())
            self._after_input()
            await asyncio.sleep(1.0)
            self._opening = None
            return
        self.leader.on_store(wanted, port, asyncio.get_running_loop().time())
        self._after_input()
