"""How an agent finds the leader: it reads the run directory, and asks the agents before it in Slurm's order.

An agent that reaches none of these becomes a candidate itself. ``membership.election`` has the rules.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership import messages
from elastic_hpc.membership.election import order_of_succession
from elastic_hpc.membership.messages import WHO, Redirect
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Hosts
from elastic_hpc.network.channel import Link
from elastic_hpc.network.following import Loss
from elastic_hpc.network.identity import RunIsOver
from elastic_hpc.network.node import Node, Transport, now
from elastic_hpc.network.own_leader import OwnLeader
from elastic_hpc.network.tasks import end, within

log = logging.getLogger(__name__)

_FAILED = (OSError, asyncio.TimeoutError, messages.ProtocolError, ElasticError)
_SAMPLE = 3
"""A candidate asks this many nodes after it in Slurm's order, at a time, which leader they follow."""

_MORE = 8
"""Factor by which the number of nodes asked at a time grows while their answers do not lead to the leader."""

_RETRY, _RETRY_AT_MOST, _RETRY_GROWTH = 0.1, 1.0, 1.5
"""Seconds between two attempts to find a leader, at first and at most, and the factor by which they grow. A jitter
changes them by up to half.
"""

_RETRY_PER_NODE = 0.001
"""Seconds per node of the job in the longest wait: after a loss all agents dial the same node."""

_WARN_AFTER, _WARN_GROWTH = 5.0, 3.0
"""Seconds without a leader until the log has a warning, and the factor by which they grow for the next warning."""

Found = tuple[Link, Host]
"""A leader, and a connection to it."""


class Finder:
    """Looks for the leader whenever this node has none."""

    def __init__(
        self,
        me: Host,
        node: Node,
        transport: Transport,
        promises: Promises,
        own_leader: OwnLeader,
        heartbeat_timeout: float,
    ) -> None:
        """``promises`` hold the roster, which names the nodes that can be asked."""
        self._me = me
        self._node = node
        self._transport = transport
        self._promises = promises
        self._own_leader = own_leader
        self._timeout = heartbeat_timeout
        self.reason = "no leader has published its address"
        """Why there is no leader."""
        self._lost: Host | None = None
        """The last leader that was lost, on another node."""
        self._lost_at = 0.0
        self._tried: Host | None = None
        """The leader that the run directory names, if this agent has just reached it without being led: it asks other
        agents next.
        """
        self._lost_silently = False
        self._in_vain = 0
        """How many nodes have not answered, since the last loss, before one did."""
        self._open: dict[int, Link] = {}
        """By node: connections to nodes that say that they lead, or will lead."""

    @property
    def may_lead(self) -> bool:
        """Whether this node leads when no node before it does: the voting members of the newest round may lead."""
        roster = self._promises.roster
        return self._promises.votes and bool(roster and self._me.node in roster.successors)

    def on_loss(self, leader: Host, loss: Loss) -> None:
        """``leader`` was lost just now."""
        abdicated = self._own_leader.abdicated if leader == self._me else ""
        self.reason = abdicated or f"{leader.name} lost: {loss.reason}"
        self._lost = leader if leader != self._me else self._lost
        self._lost_at, self._lost_silently, self._in_vain = now(), loss.silent, 0

    async def find(self) -> Found:
        """A connection to the node that leads, or will lead once it has a majority. Raises RunIsOver."""
        began, wait, warn_after = now(), _RETRY, _WARN_AFTER
        while True:
            found = await self._first_of(self._try())
            if found:
                return found
            if (waited := now() - began) > warn_after:
                warn_after *= _WARN_GROWTH
                log.warning("no leader was found for %.0f s: %s; still looking", waited, self.reason)
            await asyncio.sleep(random.uniform(0.5, 1.5) * wait)  # noqa: S311 - jitter
            roster = self._promises.roster
            bound = max(2 * _RETRY, _RETRY_PER_NODE * len(roster.hosts)) if roster else _RETRY_AT_MOST
            wait = min(_RETRY_GROWTH * wait, bound, _RETRY_AT_MOST)

    async def _first_of(self, search: Awaitable[Found | None]) -> Found | None:
        """What ``search`` finds. Closes all other connections that ``search`` has opened."""
        try:
            return await search
        finally:
            for link in self._open.values():
                link.close()
            self._open.clear()

    async def _try(self) -> Found | None:
        if self._own_leader.server:
            return await self._connect(self._me)
        roster = self._promises.roster
        if not roster:
            return await self._look_up()
        lost = self._lost.node if self._lost else None
        someone_is_ahead = False
        ahead = order_of_succession(roster.successors, lost=lost, me=self._me.node if self.may_lead else None)
        just_lost = now() - self._lost_at < self._timeout
        if self._lost_silently and just_lost:
            ahead = [node for node in ahead if node != lost]  # the other nodes know whether it still leads
        async for node, reply in self._ask_in_turn(Hosts.of(roster.hosts), ahead):
            if reply and reply.to and reply.to == self._lost and just_lost:
                return None  # most probably it has not noticed the loss yet
            if reply and reply.to and (found := await self._connect(reply.to)):
                return found
            if reply and reply.may_lead and node != lost:
                someone_is_ahead = True
                break
        published = await self._node.published()
        leader = published and published.leader
        may_lead_again = leader != self._lost or not just_lost  # this node may have been cut off from it
        if leader and leader != self._me and may_lead_again and (found := await self._connect(leader)):
            return found
        if someone_is_ahead or not self.may_lead:
            return None
        self._own_leader.begin(self.reason)
        return await self._connect(self._me)

    async def _look_up(self) -> Found | None:
        """The leader that the run directory names, or a later leader: the run directory may have been full since a
        take-over.
        """
        published = await self._node.published()
        if not published:
            return None
        again, self._tried = self._tried == published.leader, None
        if published.leader != self._me and not again and (found := await self._connect(published.leader)):
            self._tried = published.leader
            return found
        others = [host for host in published.others if host.node != self._me.node]
        for host in random.sample(others, min(_SAMPLE, len(others))):
            reply = await self._ask(host)
            if reply and reply.leads and reply.to and (found := await self._connect(reply.to)):
                return found
        return None

    async def redirected(self, to: Host) -> Found | None:
        """A connection to ``to``, which an agent that does not lead has named as its leader."""
        return await self._connect(to) if to != self._me else None

    async def instead_of_candidacy(self, link: Link) -> Found | None:
        """While this node is a candidate, look for a node that leads, or precedes it. If such a node is found, the
        candidacy ends, and with it ``link``, this node's connection to itself. Both also end before RunIsOver is
        raised.
        """
        while self._own_leader.is_candidate():
            await asyncio.sleep(self._timeout / 5)
            try:
                found = await self._first_of(self._try_elsewhere()) if self._own_leader.is_candidate() else None
            except RunIsOver:
                self._own_leader.stop()
                link.close()
                raise
            if found and self._own_leader.is_candidate():
                self._own_leader.stop()
                link.close()
                return found
            if found:
                found[0].close()
        return None

    async def _try_elsewhere(self) -> Found | None:
        roster = self._promises.roster
        assert roster
        published = await self._node.published()
        if published and published.leader != self._me and (found := await self._connect(published.leader)):
            return found
        others = [host for host in roster.hosts if host.node != self._me.node]
        before = [host for host in others if host.node < self._me.node]
        after = [host for host in others if host.node > self._me.node]
        for host in [*before, *random.sample(after, min(_SAMPLE, len(after)))]:
            reply = await self._ask(host)
            leader = reply.to if reply else None
            if leader and leader != self._me and ((reply and reply.leads) or leader.node < self._me.node):
                found = await self._connect(leader)
                if found:
                    return found
        return None

    async def _ask_in_turn(self, hosts: Hosts, nodes: Sequence[int]) -> AsyncIterator[tuple[int, Redirect | None]]:
        """The answers of ``nodes``, in their order. The search asks one node first, or one more than did not answer the
        last time, then ever more at a time: nodes without power do not answer, and all nodes of a rack may have lost
        power.
        """
        at, together = 0, self._in_vain + 1
        while at < len(nodes):
            batch = nodes[at : at + together]
            asked = [asyncio.ensure_future(self._ask(hosts.at(node))) for node in batch]
            try:
                replies = await asyncio.gather(*asked)
            finally:
                await end(asked)
            self._in_vain = at + next((before for before, reply in enumerate(replies) if reply), len(batch))
            for node, reply in zip(batch, replies, strict=True):
                yield node, reply
            at, together = at + together, _MORE * together

    async def _ask(self, host: Host) -> Redirect | None:
        """The leader that ``host`` follows; None if ``host`` does not answer. The connection stays open if ``host``
        names itself.
        """
        link: Link | None = None
        try:
            link = await self._transport.dial(host)
            link.send({"request": WHO})
            reply = messages.decode_from_leader(await within(self._timeout / 5, link.read()))
            if not isinstance(reply, Redirect):
                return Redirect(None)
            if reply.to and reply.to.node == host.node:
                self._open[host.node], link = link, None
            return reply
        except _FAILED:
            return None
        finally:
            if link:
                link.close()

    async def _connect(self, leader: Host) -> Found | None:
        if link := self._open.pop(leader.node, None):
            return link, leader
        host = replace(leader, addresses=(*leader.addresses, "127.0.0.1")) if leader == self._me else leader
        try:
            return await self._transport.dial(host), leader
        except _FAILED as error:
            if not self._promises.roster:
                self.reason = f"{leader.name} at {' or '.join(host.addresses)} port {leader.port}: {error}"
            return None
