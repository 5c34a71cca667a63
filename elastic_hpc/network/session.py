"""Keeps an agent connected to the leader of its job: the agent finds the leader, follows it until it is lost, and
leads itself when its turn comes.

This runs on the control thread, touches no file, and waits for nothing without a deadline. The three parts are
``finding``, ``following`` and ``own_leader``; this module puts them together, and answers peers that connect.
``tests/unit/test_membership.py`` runs whole jobs of this code in simulated time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from elastic_hpc.errors import JobEnded
from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import Redirect, Status
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.network.channel import Link
from elastic_hpc.network.finding import Finder, Found
from elastic_hpc.network.following import Follower
from elastic_hpc.network.identity import RunIsOver
from elastic_hpc.network.node import Node, Transport, now
from elastic_hpc.network.own_leader import OwnLeader
from elastic_hpc.network.probing import Prober
from elastic_hpc.network.tasks import end, within

_MOST_REDIRECTS = 3
"""How many agents in turn may name another leader, before this agent starts its search for the leader over."""

_NEXT = 60.0
"""Seconds that the remaining agents give one of them to end or requeue the job."""

_REFUSED = 3
"""An agent that the leader refuses, because of another agent of its node, leaves after this many heartbeat timeouts."""


class Membership:
    """``run`` keeps this agent connected to the leader until ``leave``."""

    def __init__(
        self,
        me: Host,
        node: Node,
        transport: Transport,
        promises: Promises,
        *,
        heartbeat_timeout: float,
        join_timeout: float,
        first: bool,
    ) -> None:
        """``first``: this agent leads from the start. ``join_timeout``: how long it waits for the first leader, in
        seconds.
        """
        self._me = me
        self._node = node
        self._transport = transport
        self._timeout = heartbeat_timeout
        self._join_timeout = join_timeout
        self._first = first
        self._promises = promises
        self._own_leader = OwnLeader(node.lead, promises)
        self._follower = Follower(node, promises, heartbeat_timeout, Prober(me, transport, promises))
        self._finder = Finder(me, node, transport, promises, self._own_leader, heartbeat_timeout)
        self._left = asyncio.Event()
        self._tasks: list[asyncio.Future[None]] = []
        self._alone_since = 0.0
        """When this agent was last connected to a leader, or began to look for a leader."""
        self._refused_since: float | None = None

    async def run(self) -> None:
        """Returns after ``leave``, and on a leader when all others have left too."""
        self._transport.on_stranger = self._on_stranger
        self._transport.on_over = self._on_over
        await self._transport.serve(self._attend)
        if self._first:
            self._own_leader.begin("")
        self._tasks = [
            asyncio.ensure_future(self._until_over(work))
            for work in (self._follow(), self._watch(), self._look_for_a_later_run())
        ]
        waiting: set[asyncio.Future[Any]] = {*self._tasks, asyncio.ensure_future(self._left.wait())}
        try:
            while not self._left.is_set():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled():
                        task.result()  # raises what went wrong
            self._follower.disconnect()
            await self._own_leader.finish()
        finally:
            for task in (*self._tasks, *waiting):
                task.cancel()
            self._own_leader.cancel()

    def leave(self) -> None:
        self._left.set()

    def send_status(self) -> None:
        """The status of this node has changed."""
        self._follower.send_status()

    def terminated(self) -> None:
        """This agent got SIGTERM. On the leader's node that means that the allocation ends."""
        if self._own_leader.server:
            self._own_leader.server.on_request("drain", "terminated")

    def _on_over(self, over: RunIsOver) -> None:
        """This agent neither leads nor follows from now on: Slurm has started the job again."""
        for task in self._tasks:
            task.cancel()
        self._own_leader.stop()
        self._follower.disconnect()
        self._node.ended(JobEnded("lost", str(over)))

    async def _until_over(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except RunIsOver as over:
            self._on_over(over)

    async def _follow(self) -> None:
        """Follow one leader after the other, until the job ends. Raises RunIsOver."""
        found: Found | None = None
        redirects = 0
        try:
            while not (self._left.is_set() or self._follower.is_over):
                link, leader = found or await self._finder.find()
                found = None
                candidacy = (
                    asyncio.ensure_future(self._finder.instead_of_candidacy(link)) if leader == self._me else None
                )
                try:
                    loss = await self._follower.follow(link, leader)
                finally:
                    link.close()
                    if candidacy:
                        await end([candidacy])
                        found = None if candidacy.cancelled() else candidacy.result()
                if loss:
                    self._finder.on_loss(leader, loss)
                redirects = redirects + 1 if self._follower.redirected else 0
                if not found and self._follower.redirected and redirects <= _MOST_REDIRECTS:
                    found = await self._finder.redirected(self._follower.redirected)
                if refusal := self._follower.refusal:
                    await self._wait_for_place(refusal)
        finally:
            if found:  # the job ended, or this agent left, before that leader was followed
                found[0].close()

    async def _wait_for_place(self, reason: str) -> None:
        """The leader has another agent of this node, which may be lost or frozen: then its place is free after the
        heartbeat timeout. An agent that is refused for longer leaves.
        """
        self._alone_since = now()  # a leader that refuses this agent is a leader too
        self._refused_since = self._refused_since or self._alone_since
        if self._alone_since - self._refused_since > _REFUSED * self._timeout:
            self._node.ended(JobEnded("lost", reason))
        await asyncio.sleep(self._timeout / 5)

    async def _watch(self) -> None:
        """Have the node give up when it had no leader for too long: the allocation may be idle. Raises RunIsOver."""
        self._alone_since = now()
        others: list[str] = []
        is_first = True
        while True:
            await asyncio.sleep(self._timeout / 5)
            last_led = self._follower.last_led
            if last_led is not None and last_led > self._alone_since:
                self._alone_since, self._refused_since = last_led, None
            waited = now() - self._alone_since
            if waited <= self._timeout:
                others, is_first = [], True
            else:
                if server := self._own_leader.server:  # asks for a majority, gives up, and asks again
                    others = server.leader.peers.names(without=self._me.node) or others
                order = self._follower.order
                if order and not order.leads and self._follower.leader != self._me:  # another asks and acts first
                    is_first = False
                roster, reason = self._promises.roster, self._finder.reason
                after_a_loss = 2 * self._timeout + 2.0 * min(self._me.node, 20)
                if not is_first:
                    after_a_loss += _NEXT + self._me.node
                patient = waited < (self._join_timeout if last_led is None else after_a_loss)
                over = await self._node.give_up(roster, waited, reason, patient=patient, others=others)
                if over:
                    self._node.ended(over)
                    return

    async def _look_for_a_later_run(self) -> None:
        """A leader with a majority has no reason to look for other agents, and no agent of a later run may know of it.
        Raises RunIsOver.
        """
        while True:
            await asyncio.sleep(self._timeout)
            if (server := self._own_leader.server) and server.leader.leads:
                await self._node.published()

    async def _attend(self, link: Link) -> None:
        """A peer that holds the secret has connected."""
        with contextlib.suppress(OSError, asyncio.TimeoutError, messages.ProtocolError):
            while True:
                line = await within(self._timeout, link.read())
                message = messages.decode_from_agent(line)
                server = self._own_leader.server
                if server and isinstance(message, Status):
                    await server.attend(link, message)
                    return
                # an agent that does not lead answers every request with the name of the leader; the same answer of the
                # leader acknowledges a request
                if not (server and server.leader.leads) or message == "who":
                    pass
                elif not isinstance(message, (Roster, Status)):
                    answer = server.on_request(message, str(messages.decode(line).get("reason", "user")))
                    link.send(Redirect(self._me, leads=True, refusal=answer.refusal, answer=answer.text))
                    continue
                link.send(self._whom_to_follow())

    def _whom_to_follow(self) -> Redirect:
        if self._own_leader.server:
            return Redirect(self._me, self._own_leader.server.leader.leads)
        order = self._follower.order
        return Redirect(self._follower.leader, bool(order and order.leads), self._finder.may_lead)

    def _on_stranger(self, addr: str, reason: str) -> None:
        if self._own_leader.server:
            self._own_leader.server.on_stranger(addr, reason)
