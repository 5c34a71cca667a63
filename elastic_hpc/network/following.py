"""An agent that follows a leader: it reports the status of its node, learns rosters, and passes the orders on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NamedTuple

from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import Order, Redirect
from elastic_hpc.membership.roster import Host, Roster, RosterChange
from elastic_hpc.network.channel import Link
from elastic_hpc.network.node import Node, now
from elastic_hpc.network.own_leader import OwnLeader


class Loss(NamedTuple):
    """How the connection to a leader with a majority ended."""

    reason: str
    silent: bool
    """Whether nothing was received for the heartbeat timeout."""


class Follower:
    """Follows one leader after another, and keeps the highest round and the newest roster of all of them."""

    def __init__(self, node: Node, own_leader: OwnLeader, heartbeat_timeout: float) -> None:
        self._node = node
        self._own_leader = own_leader
        self._timeout = heartbeat_timeout
        self.leader: Host | None = None
        """The leader that this agent follows now."""
        self.redirected: Host | None = None
        """The leader that the agent followed last has named, as it does not lead itself."""
        self.order: Order | None = None
        """The latest order of that leader; after the end of the job, of the last leader."""
        self.last_led: float | None = None
        """When the last order of a leader with a majority came."""
        self._link: Link | None = None
        self._last_contact = 0.0
        self._roster: Roster | None = None
        self._highest_round = 0
        self._seq = 0

    @property
    def roster(self) -> Roster | None:
        """The newest roster that this node holds: as an agent, or as the leader that it is or was."""
        led = self._own_leader.roster
        if led and (not self._roster or led.round > self._roster.round):
            self._roster = led
        return self._roster

    @property
    def is_over(self) -> bool:
        """Whether the leader has ended the job."""
        return bool(self.order and self.order.stage == "end")

    async def follow(self, link: Link, leader: Host) -> Loss | None:
        """Obey ``leader`` until ``link`` ends. None if ``leader`` had no majority meanwhile, or has ended the job."""
        self._link, self.leader, self._last_contact = link, leader, now()
        self.redirected = None
        heartbeat = asyncio.ensure_future(self._send_heartbeats(link))
        self.send_status()
        last_seq, led, reason = -1, False, "its connection was closed"
        try:
            while True:
                message = messages.decode_from_leader(await link.read())
                self._last_contact = now()
                if isinstance(message, Redirect):
                    reason, self.redirected = "it does not lead any more", message.to
                    break
                if isinstance(message, (Roster, RosterChange)):
                    if self._learn(message):
                        self.send_status()  # the leader may wait for this acknowledgement
                elif message.seq > last_seq:
                    last_seq, led = message.seq, led or message.leads
                    self._obey(message, link)
        except (OSError, messages.ProtocolError) as error:
            reason = str(error) or reason
        finally:
            heartbeat.cancel()
            self._link = self.leader = None
            silent = now() - self._last_contact >= self._timeout
            if not self.is_over:
                self.order = None
                self._node.set_order(None, None)
        if self.is_over or not led:
            return None
        return Loss(f"nothing heard for {self._timeout:g} s" if silent else reason, silent)

    def send_status(self) -> None:
        """Send the status of this node to the leader, if there is one: on every change, and as the heartbeat."""
        if not self._link:
            return
        self._seq += 1
        held = self.roster
        round, mark = (held.round, held.mark) if held else (-1, "")
        status = replace(self._node.status(), seq=self._seq, seen=self._highest_round, roster=round, mark=mark)
        self._link.send(status)

    def disconnect(self) -> None:
        if self._link:
            self._link.close()

    def _learn(self, news: Roster | RosterChange) -> bool:
        """Whether ``news`` led to a newer roster. A change of a roster that this node does not hold is ignored."""
        held = self.roster
        if held and news.round <= held.round:
            return False
        if isinstance(news, Roster):
            self._roster = news
        elif held and news.since == held.mark:
            self._roster = news.of(held)
        else:
            return False
        return True

    def _obey(self, order: Order, link: Link) -> None:
        self._highest_round = max(self._highest_round, order.round)
        if order.leads:
            self.last_led = now()
        held = self.roster
        if held and held.round > order.roster:
            link.send(held)
        elif order.plan and (not held or held.round < order.round):
            return  # without the roster of its round this node must not start: the leader sends it again
        if held and held.round == order.roster and any(base.round < order.oldest for base in held.bases):
            self._roster = replace(held, bases=tuple(base for base in held.bases if base.round >= order.oldest))
        self.order = order
        self._node.set_order(order, link)

    async def _send_heartbeats(self, link: Link) -> None:
        """Send a status a few times per timeout until the leader has been silent for too long; then close ``link``."""
        interval = self._timeout / 5
        before = now()
        while True:
            await asyncio.sleep(interval)
            woken = now()
            # while this process was frozen nothing could be received
            self._last_contact += max(0.0, woken - before - 2 * interval)
            before = woken
            if woken - self._last_contact > self._timeout:
                link.close()
                return
            self.send_status()
