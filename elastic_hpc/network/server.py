"""The leader on the network: its agents' messages go in, its orders go out. Never blocks.

The recorder's thread writes the files, stores are opened in threads that can be abandoned, and Slurm's commands run in
threads. So a file system or a name server that stalls cannot keep the leader from answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, Protocol

from elastic_hpc.membership import messages
from elastic_hpc.membership.growth import Needs
from elastic_hpc.membership.hangs import Rhythm
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import Leave, Status, Stay, ToLeader
from elastic_hpc.membership.nodes import BATCH_HOST
from elastic_hpc.membership.policy import Verdict
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.sizing import Answer
from elastic_hpc.membership.wishes import Bounds
from elastic_hpc.network.channel import Link
from elastic_hpc.network.tasks import within

log = logging.getLogger(__name__)

LEAVE_TIMEOUT = 10.0
"""Seconds that the agents have to leave after the verdict before the leader leaves."""

STORE_TIMEOUT = 10.0
"""Seconds that the store of a round may take to open before the leader is notified, and another attempt begins."""

_REST, _REST_AT_MOST = 4.0, 0.02
"""After a decision, the leader rests for this many times the duration of the decision, but at most for this many
seconds: the time of a decision grows with the number of agents, and messages that arrive meanwhile share one decision.
"""

_EVENTS_OF_STRANGERS = 20
"""At most this many refused connections are recorded."""


class Record(Protocol):
    """Where the leader's record goes (``record.recorder.Recorder``). No method blocks."""

    @property
    def warning(self) -> str:
        """Why Slurm has warned this run, for every leader to see; empty if it has not. Current after each ``beat``."""

    @property
    def stalls(self) -> bool:
        """Whether the file system of the record does not answer."""

    def publish(self, agents: Iterable[Host]) -> None: ...
    def beat(self) -> None: ...
    def event(self, name: str, fields: dict[str, Any]) -> None: ...
    def state(self, *, bounds: Bounds | None, rhythm: Rhythm, **state: int) -> None: ...
    def verdict(self, verdict: dict[str, Any]) -> Future[None]: ...


class Act(Protocol):
    """Requeues or ends the job, as the verdict says. ``lost``: the names of lost nodes; ``alone``: the batch host is
    among them; ``others``: the names of the other nodes that are left.
    """

    async def __call__(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None: ...


class Supplier(Protocol):
    """Brings the nodes that the leader could use (``agent.supply.Supply``)."""

    def need(self, needs: Needs) -> None: ...
    async def run(
        self, report: Callable[[Needs, int, int], None], given_back: Callable[[Collection[int]], None]
    ) -> None:
        """Run until cancelled. ``report(needs, starting, pending)`` reports how many agents are starting, and how many
        nodes were requested from Slurm, in answer to ``needs``. ``given_back(nodes)`` reports which nodes of
        ``needs.surplus`` were returned to Slurm.
        """


class Watches(Protocol):
    """Watches what Slurm and the site say about the job (``agent.lookout.Lookout``)."""

    async def run(self, leader: Leader, on_input: Callable[[], None]) -> None:
        """Run until cancelled. Calls ``on_input`` after it has given inputs to the leader."""


class LeaderServer:
    """Serves ``leader``. ``open_store(round)`` starts a store and returns its port; the server calls it again if it
    fails, or was cancelled as late. ``supply`` brings nodes, ``lookout`` watches what Slurm and the site say.
    """

    def __init__(
        self,
        leader: Leader,
        record: Record,
        open_store: Callable[[int], Awaitable[int]],
        act: Act,
        supply: Supplier | None = None,
        lookout: Watches | None = None,
    ) -> None:
        self.leader = leader
        self.record = record
        self._open_store = open_store
        self._act = act
        self._supply = supply
        self._lookout = lookout
        self._opening: int | None = None
        """The round whose store was opened last, or is being opened."""
        self._links: dict[int, Link] = {}
        """By the number of the connection, the same as in ``leader``."""
        self._connections = itertools.count(1)
        self._strangers = 0
        self._deciding: asyncio.TimerHandle | None = None
        self._rests_until = 0.0
        self._published = self._ends = self._batch_host_is_lost = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> str:
        """Lead until every agent has left after the verdict, or until this leader abdicates. Returns the reason to
        abdicate, or an empty text.
        """
        loop = asyncio.get_running_loop()
        interval = self.leader.policy.heartbeat_timeout / 5
        saving: asyncio.Future[list[str]] | None = None
        leave_at = float("inf")
        next_heartbeat = 0.0
        beside: list[asyncio.Future[None]] = []
        if self._supply:
            beside.append(asyncio.ensure_future(self._supply.run(self._on_coming, self._on_given_back)))
        if self._lookout:
            beside.append(asyncio.ensure_future(self._lookout.run(self.leader, self._after_input)))
        try:
            self._after_input()
            while not (saving and saving.done() and (not self._links or loop.time() > leave_at)):
                due = min(next_heartbeat, max(loop.time() + 0.01, self.leader.next_expiry + 0.001))
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(max(0.0, due - loop.time()), self._changed.wait())
                self._changed.clear()
                now = loop.time()
                self.leader.stalls = self.record.stalls
                self.leader.on_tick(now, time.time())
                beat = now > next_heartbeat - 0.001  # a timer may be early by the resolution of the clock
                self._after_input(beat=beat)
                next_heartbeat = now + interval if beat else next_heartbeat
                if self.leader.abdicated:
                    return self.leader.abdicated
                if self.leader.leads:
                    self.record.beat()
                    if self.record.warning:
                        self.on_request("drain", self.record.warning)
                if self.leader.verdict and saving is None:
                    saving = asyncio.ensure_future(self._save(self.leader.verdict))
                    saving.add_done_callback(lambda _: self._changed.set())
                elif saving and saving.done() and leave_at == float("inf"):
                    leave_at = loop.time() + LEAVE_TIMEOUT
            verdict = self.leader.verdict
            if verdict and not self._batch_host_is_lost and (verdict.outcome == "requeue" or saving.result()):
                # not left to the batch script: srun waits for lost nodes until Slurm notices, which may take minutes
                await self._act_on(verdict, saving.result(), alone=False, others=[])
            return ""
        finally:
            for task in (*self._tasks, *beside):
                task.cancel()
            for link in self._links.values():
                link.close()

    async def attend(self, link: Link, first: Status) -> None:
        """Receive the messages of one agent until its connection ends. ``first``: the first message."""
        conn = next(self._connections)
        self._links[conn] = link
        now = asyncio.get_running_loop().time
        reason = "its connection was closed"
        message: object = first
        try:
            while True:
                if isinstance(message, Status):
                    _check_speaker(message, link)
                    self.leader.on_status(conn, link.peer, message, now(), boot=link.identity.boot)
                elif isinstance(message, Roster):
                    self.leader.on_roster(message)
                self._decide_soon()
                message = messages.decode_from_agent(await link.read())
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
        """Decide in the next pass of the event loop, or after the rest: messages that a thousand agents send at once
        lead to few decisions.
        """
        if self.leader.has_news and not self._deciding:
            loop = asyncio.get_running_loop()
            self._deciding = loop.call_at(max(loop.time(), self._rests_until), self._decide)

    def _decide(self) -> None:
        self._deciding = None
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.leader.decide(began)
        ended = loop.time()
        self._rests_until = ended + min(_REST * (ended - began), _REST_AT_MOST)
        self._after_input()

    def on_request(self, request: ToLeader, reason: str = "") -> Answer:
        """A peer that holds the secret requests something of the job, because of ``reason``."""
        now = asyncio.get_running_loop().time()
        answer = Answer()
        match request:
            case Leave(node, why, exclude, give_back):
                answer = self.leader.on_leave(node, why, now, exclude=exclude, give_back=give_back)
            case Stay(name):
                answer = self.leader.on_stay(name, now)
            case Bounds():
                answer = self.leader.on_resize(request, now)
            case _:
                self.leader.on_request(request, reason, now)
        self._after_input()
        return answer

    def on_cap(self, nodes: int | None, reason: str) -> None:
        """See ``Leader.on_cap``."""
        self.leader.on_cap(nodes, reason, asyncio.get_running_loop().time())
        self._after_input()

    def _on_given_back(self, nodes: Collection[int]) -> None:
        self.leader.on_given_back(nodes, asyncio.get_running_loop().time())
        self._after_input()

    def _on_coming(self, needs: Needs, starting: int, pending: int) -> None:
        self.leader.on_coming(needs, starting, pending, asyncio.get_running_loop().time())
        self._after_input()

    def on_stranger(self, addr: str, reason: str) -> None:
        """A connection without the secret was refused."""
        self._strangers += 1
        if self._strangers <= _EVENTS_OF_STRANGERS:
            self.record.event("stranger", {"addr": addr, "reason": reason})

    async def _save(self, verdict: Verdict) -> list[str]:
        self._batch_host_is_lost = BATCH_HOST not in self.leader.peers.by_node
        actor = "agents" if self._batch_host_is_lost else "batch script"
        written = self.record.verdict({**asdict(verdict), "actor": actor})
        try:
            await within(LEAVE_TIMEOUT, asyncio.wrap_future(written))
        except (OSError, asyncio.TimeoutError) as error:
            log.warning("the verdict could not be written: %s", error or "the file system does not answer")
        lost = self.leader.peers.lost_names
        if self._batch_host_is_lost:
            # before any agent leaves: if this node dies now, the others act
            await self._act_on(verdict, lost, alone=True, others=self.leader.peers.names(without=self.leader.node))
        self.leader.on_saved()
        self._after_input()
        return lost

    async def _act_on(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None:
        try:
            await self._act(verdict, lost, alone=alone, others=others)
        except Exception:  # even then the agents must leave: then others may act
            log.exception("the verdict could not be acted upon")

    def _after_input(self, *, beat: bool = False) -> None:
        leader = self.leader
        if leader.has_led and not self._published:
            self._published = True
            self._publish()
        for name, fields in leader.take_events() if leader.has_led else ():
            self.record.event(name, fields)
            if name == "round":
                self._publish()
            if name in {"round", "restart", "verdict", "resize", "leave", "stay", "hang_timeout"}:
                counters = {"restarts": leader.restarts, "requeues": leader.requeues}
                bounds, rhythm = leader.wishes.bounds, leader.rhythm
                self.record.state(round=leader.roster.round, **counters, bounds=bounds, rhythm=rhythm)
        for conn in leader.take_dropped():
            if conn in self._links:
                self._links[conn].close()
        for conn, orders in leader.take_orders(beat=beat).items():
            if conn in self._links:
                self._links[conn].send(*orders)
        wanted = leader.wanted_store
        if wanted is not None and wanted != self._opening:
            self._opening = wanted
            task = asyncio.ensure_future(self._open(wanted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._supply and (needs := leader.needs):
            self._supply.need(needs)
        if (leader.verdict or leader.abdicated) and not self._ends:
            self._ends = True
            self._changed.set()

    def _publish(self) -> None:
        leader = self.leader
        self.record.publish(host for host in leader.roster.hosts if host.node in leader.peers.by_node)

    async def _open(self, wanted: int) -> None:
        try:
            port = await within(STORE_TIMEOUT, self._open_store(wanted))
        except Exception as error:  # noqa: BLE001 - whatever keeps a store from opening is recorded, and tried again
            late = f"it did not open within {STORE_TIMEOUT:g} s" if isinstance(error, asyncio.TimeoutError) else ""
            problem = (late or str(error) or type(error).__name__).splitlines()[0]  # torch's own traceback may follow
            self.leader.on_store_failed(wanted, problem, asyncio.get_running_loop().time())
            self._after_input()
            await asyncio.sleep(1.0)
            if self._opening == wanted:
                self._opening = None
                self._after_input()
            return
        self.leader.on_store(wanted, port, asyncio.get_running_loop().time())
        self._after_input()


def _check_speaker(status: Status, link: Link) -> None:
    if status.node != link.identity.node:
        raise messages.ProtocolError(f"the status of {status.name} comes from {link.identity.name}")
