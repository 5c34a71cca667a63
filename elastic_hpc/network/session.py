"""One agent among the others: follows the leader, finds the next one when it is gone, leads when it is its turn.

Runs on the control thread, touches no file, and never waits for anything without a deadline. What it decides by stands
in ``membership.election``; ``tests/unit/test_membership.py`` runs whole jobs of this code in simulated time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.membership import messages
from elastic_hpc.membership.election import order_of_succession
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import WHO, Leave, Order, Redirect, Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.roster import Host, Hosts, Roster, RosterChange
from elastic_hpc.network.channel import Link
from elastic_hpc.network.server import LeaderServer

log = logging.getLogger(__name__)

_FAILED = (OSError, asyncio.TimeoutError, messages.ProtocolError, ElasticError)
_OTHERS = 3
"""How many of the nodes that come later in the order are asked at a time whom they follow."""

_LOOK_AGAIN, _LOOK_AT_MOST, _LOOK_GROWTH = 0.1, 1.0, 1.5
"""Seconds until a leader is looked for again, at first and in the end, and how they grow; half of it is jitter."""

_LOOK_PER_NODE = 0.001
"""Seconds: after a loss all turn to the same node, so how long they may take depends on how many there are."""

_TELL_AFTER, _TELL_GROWTH = 5.0, 3.0
"""Seconds without a leader after which the log says so, and how they grow from one time to the next."""


class Transport(Protocol):
    """``channel.Network``, or a simulated one."""

    on_stranger: Callable[[str, str], None]

    async def serve(self, attend: Callable[[Link], Awaitable[None]]) -> object: ...
    async def dial(self, addresses: Sequence[str], port: int) -> Link: ...


class Node(Protocol):
    """What membership knows of its own node."""

    def status(self) -> Status:
        """What the workers do; the fields that belong to the connection are filled in here."""

    def set_order(self, order: Order | None, link: Link | None) -> None:
        """The leader's latest order, None without a leader: then the workers may not go on."""

    def ended(self, over: JobEnded) -> None: ...
    async def published(self) -> Host | None:
        """The leader that the run directory names."""

    async def give_up(self, roster: Roster | None, waited: float, why: str, *, patient: bool) -> JobEnded | None:
        """No leader for ``waited`` seconds, because of ``why``; none ever if there is no ``roster``. Unless ``patient``
        see to it that the job returns or ends.
        """

    def lead(self, roster: Roster | None, reason: str) -> LeaderServer:
        """A leader on this node: the first one, or one that takes over."""


class Membership:
    """``run`` keeps this agent in touch with the leader until ``leave``."""

    def __init__(
        self, me: Host, node: Node, transport: Transport, *, heartbeat_timeout: float, join_timeout: float, first: bool
    ) -> None:
        """``first``: this agent leads from the start. ``join_timeout``: how long the others wait for it, in seconds."""
        self.me = me
        self._node = node
        self._transport = transport
        self._timeout = heartbeat_timeout
        self._patience = join_timeout
        self._first = first
        self._server: LeaderServer | None = None
        self._led: Leader | None = None
        self._leading: asyncio.Task[str] | None = None
        self._link: Link | None = None
        self._better: tuple[Link, Host] | None = None
        self._following: Host | None = None
        self._order: Order | None = None
        self._roster: Roster | None = None
        self._lost: Host | None = None
        self._lost_why = "no leader has published its address"
        self._silently = False
        self._seq = self._seen = 0
        self._led_at = self._lost_at = 0.0
        self._heard = 0.0
        self._left = asyncio.Event()

    async def run(self) -> None:
        """Returns after ``leave``, and on a leader when all others have left too."""
        self._transport.on_stranger = self._on_stranger
        await self._transport.serve(self._attend)
        self._led_at = self._now()
        if self._first:
            self._lead("")
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(work) for work in (self._follow(), self._watch(), self._left.wait())
        ]
        waiting = set(tasks)
        try:
            while not self._left.is_set():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises what went wrong
            if self._link:
                self._link.close()
            if self._leading and self._server and self._server.leader.verdict:
                await self._leading
        finally:
            for task in (*tasks, *([self._leading] if self._leading else [])):
                task.cancel()

    def leave(self) -> None:
        self._left.set()

    def say(self) -> None:
        """Tell the leader how this node is; on every change, and as the heartbeat."""
        if not self._link:
            return
        self._seq += 1
        held = self._known()
        roster, mark = (held.round, held.mark) if held else (-1, "")
        self._link.send(replace(self._node.status(), seq=self._seq, seen=self._seen, roster=roster, mark=mark))

    def terminated(self) -> None:
        """This agent got SIGTERM. On the leader's node that is taken for the end of the allocation."""
        if self._server:
            self._server.on_request("drain", "terminated")

    # to follow

    async def _follow(self) -> None:
        while not (self._left.is_set() or (self._order and self._order.stage == "end")):
            link, leader = await self._find()
            self._following = leader
            try:
                await self._session(link, leader)
            finally:
                link.close()
                self._following = None

    async def _find(self) -> tuple[Link, Host]:
        """A connection to whoever leads, or will lead once it has a majority."""
        began, wait, tell = self._now(), _LOOK_AGAIN, _TELL_AFTER
        while True:
            found = await self._look()
            if found:
                return found
            if (waited := self._now() - began) > tell:
                tell *= _TELL_GROWTH
                log.warning("no leader was found for %.0f s: %s; looking on", waited, self._lost_why)
            await asyncio.sleep(random.uniform(0.5, 1.5) * wait)  # noqa: S311 - jitter
            roster = self._known()
            most = max(2 * _LOOK_AGAIN, _LOOK_PER_NODE * len(roster.hosts)) if roster else _LOOK_AT_MOST
            wait = min(_LOOK_GROWTH * wait, most, _LOOK_AT_MOST)

    async def _look(self) -> tuple[Link, Host] | None:
        if self._better:
            better, self._better = self._better, None
            return better
        if self._server:
            return await self._join(self.me)
        roster = self._known()
        if not roster:
            published = await self._node.published()
            return await self._join(published) if published else None
        hosts = Hosts.of(roster.hosts)
        lost = self._lost.node if self._lost else None
        someone_is_ahead = False
        for node in order_of_succession(filter(votes, hosts.rows), lost=lost, me=self.me.node):
            if node == lost and self._silently:
                continue  # the others are asked for a way back to it
            answer = await self._ask(hosts.at(node))
            if answer and answer.to and answer.to == self._lost and self._now() - self._lost_at < self._timeout:
                return None  # most probably it has not noticed the loss yet
            if answer and answer.to and (joined := await self._join(answer.to)):
                return joined
            if answer and node != lost:
                someone_is_ahead = True
                break
        published = await self._node.published()
        if published and published not in (self._lost, self.me) and (joined := await self._join(published)):
            return joined
        if someone_is_ahead or not votes(self.me.node):
            return None
        self._lead(self._lost_why)
        return await self._join(self.me)

    async def _look_elsewhere(self) -> tuple[Link, Host] | None:
        """While this node waits for a majority: does somebody else lead, or stand before it?"""
        roster = self._known()
        assert roster
        published = await self._node.published()
        if published and published != self.me and (joined := await self._join(published)):
            return joined
        others = [host for host in roster.hosts if host.node != self.me.node]
        before = [host for host in others if host.node < self.me.node]
        after = [host for host in others if host.node > self.me.node]
        for host in [*before, *random.sample(after, min(_OTHERS, len(after)))]:
            answer = await self._ask(host)
            leader = answer.to if answer else None
            if leader and leader != self.me and ((answer and answer.leads) or leader.node < self.me.node):
                joined = await self._join(leader)
                if joined:
                    return joined
        return None

    async def _ask(self, host: Host) -> Redirect | None:
        """Whom ``host`` follows; None if it does not answer."""
        try:
            link = await self._transport.dial(host.addresses, host.port)
        except _FAILED:
            return None
        try:
            link.send({"request": WHO})
            said = messages.decode_from_leader(await asyncio.wait_for(link.read(), self._timeout / 5))
            return said if isinstance(said, Redirect) else Redirect(None)
        except _FAILED:
            return None
        finally:
            link.close()

    async def _join(self, leader: Host) -> tuple[Link, Host] | None:
        addresses = (*leader.addresses, "127.0.0.1") if leader == self.me else leader.addresses
        try:
            return await self._transport.dial(addresses, leader.port), leader
        except _FAILED as error:
            if not self._roster:
                self._lost_why = f"{leader.name} at {' or '.join(addresses)} port {leader.port}: {error}"
            return None

    async def _session(self, link: Link, leader: Host) -> None:
        """Follow ``leader`` until the connection ends, or is given up for a better one."""
        self._link, self._heard = link, self._now()
        beating = asyncio.ensure_future(self._beat(link))
        elsewhere = asyncio.ensure_future(self._leave_for_another(link)) if leader == self.me else None
        self.say()
        last, led, why = -1, False, "its connection was closed"
        try:
            while True:
                said = messages.decode_from_leader(await link.read())
                self._heard = self._now()
                if isinstance(said, Redirect):
                    why = "it does not lead any more"
                    return
                if isinstance(said, (Roster, RosterChange)):
                    if self._learn(said):
                        self.say()  # the leader may wait for it
                elif said.seq > last:
                    last, led = said.seq, led or said.leads
                    self._obey(said, link)
        except (OSError, messages.ProtocolError) as error:
            why = str(error) or why
        finally:
            beating.cancel()
            if elsewhere:
                elsewhere.cancel()
            self._link = None
            if not (self._order and self._order.stage == "end"):
                if led:
                    self._silently = self._now() - self._heard >= self._timeout
                    self._lost = leader if leader != self.me else self._lost
                    self._lost_at = self._now()
                    why = f"nothing heard for {self._timeout:g} s" if self._silently else why
                    gave_up = self._led.abdicated if self._led and leader == self.me else ""
                    self._lost_why = gave_up or f"{leader.name} lost: {why}"
                self._order = None
                self._node.set_order(None, None)

    def _learn(self, said: Roster | RosterChange) -> bool:
        """Whether that was news. A change of a roster that this node does not hold says nothing to it."""
        held = self._known()
        if held and said.round <= held.round:
            return False
        if isinstance(said, Roster):
            self._roster = said
        elif held and said.since == held.mark:
            self._roster = said.of(held)
        else:
            return False
        return True

    def _obey(self, order: Order, link: Link) -> None:
        self._seen = max(self._seen, order.round)
        if order.leads:
            self._led_at, self._patience = self._now(), 2 * self._timeout + 2.0 * min(self.me.node, 20)
        mine = self._known()
        if mine and mine.round > order.roster:
            link.send(mine)
        elif order.plan and (not mine or mine.round < order.round):
            return  # without the roster of its round this node must not start: the leader sends it again
        if mine and mine.round == order.roster and any(base.round < order.oldest for base in mine.bases):
            self._roster = replace(mine, bases=tuple(base for base in mine.bases if base.round >= order.oldest))
        self._order = order
        self._node.set_order(order, link)

    async def _beat(self, link: Link) -> None:
        interval = self._timeout / 5
        ticked = self._now()
        while True:
            await asyncio.sleep(interval)
            now = self._now()
            self._heard += max(0.0, now - ticked - 2 * interval)  # while this process was frozen nobody could be heard
            ticked = now
            if now - self._heard > self._timeout:
                link.close()
                return
            self.say()

    async def _leave_for_another(self, link: Link) -> None:
        """A candidate without a majority does not stop to look for others."""
        while self._server and not self._server.leader.has_led:
            await asyncio.sleep(self._timeout / 5)
            if self._server and not self._server.leader.has_led:
                found = await self._look_elsewhere()
                if found and self._server and not self._server.leader.has_led:
                    self._better = found
                    self._stop_leading()
                    link.close()
                    return
                if found:
                    found[0].close()

    async def _watch(self) -> None:
        """Without a leader for too long, somebody must end or requeue the job: an allocation that nobody uses."""
        while True:
            await asyncio.sleep(self._timeout / 5)
            waited = self._now() - self._led_at
            if waited > self._timeout:
                patient = waited < self._patience
                over = await self._node.give_up(self._known(), waited, self._lost_why, patient=patient)
                if over:
                    self._node.ended(over)
                    return

    # to lead

    def _lead(self, reason: str) -> None:
        self._server = self._node.lead(self._known(), reason)
        self._led = self._server.leader
        self._leading = asyncio.ensure_future(self._server.run())
        self._leading.add_done_callback(self._stopped)

    def _stopped(self, task: asyncio.Task[str]) -> None:
        if not task.cancelled() and task.exception():
            log.error("the leader failed", exc_info=task.exception())
        if task is self._leading and not (self._server and self._server.leader.verdict):
            self._server = self._leading = None

    def _stop_leading(self) -> None:
        if self._leading:
            self._leading.cancel()
        self._server = self._leading = None

    async def _attend(self, link: Link) -> None:
        """Somebody who holds the secret has connected."""
        with contextlib.suppress(OSError, asyncio.TimeoutError, messages.ProtocolError):
            while True:
                line = await asyncio.wait_for(link.read(), self._timeout)
                said = messages.decode_from_agent(line)
                if not self._server or said == "who":
                    link.send(self._whom())
                elif isinstance(said, Status):
                    await self._server.attend(link, said)
                    return
                elif isinstance(said, Leave):
                    self._server.on_request(said)
                elif not isinstance(said, Roster):
                    self._server.on_request(said, str(messages.decode(line).get("reason", "user")))

    def _on_stranger(self, addr: str, reason: str) -> None:
        if self._server:
            self._server.on_stranger(addr, reason)

    def _known(self) -> Roster | None:
        """The newest roster this node holds: as an agent, or as the leader that it is or was."""
        if self._led and self._led.roster.bases and (not self._roster or self._led.roster.round > self._roster.round):
            self._roster = self._led.roster
        return self._roster

    def _whom(self) -> Redirect:
        if self._server:
            return Redirect(self.me, self._server.leader.leads)
        return Redirect(self._following, bool(self._order and self._order.leads))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
