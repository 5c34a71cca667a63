"""An agent that follows a leader: it reports the status of its node, learns rosters, and passes the orders on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NamedTuple

from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import Order, Redirect
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster, RosterChange
from elastic_hpc.network.channel import Link
from elastic_hpc.network.node import Node, now
from elastic_hpc.network.probing import Prober


class Loss(NamedTuple):
    """How the connection to a leader with a majority ended."""

    reason: str
    silent: bool
    """Whether nothing was received for the heartbeat timeout."""


class Follower:
    """Follows one leader after another; ``promises`` keeps what this node has promised to them."""

    def __init__(self, node: Node, promises: Promises, heartbeat_timeout: float, prober: Prober | None = None) -> None:
        self._node = node
        self._prober = prober
        self._promises = promises
        self._timeout = heartbeat_timeout
        self.leader: Host | None = None
        """The leader that this agent follows now."""
        self.redirected: Host | None = None
        """The leader named by the agent that this agent followed last, and that does not lead."""
        self.order: Order | None = None
        """The latest order of ``leader``; after the end of the job, of the last leader."""
        self.refusal = ""
        """Why the last leader did not admit this agent; empty if it did."""
        self.last_led: float | None = None
        """When the last order of a leader with a majority came."""
        self._link: Link | None = None
        self._last_contact = 0.0
        self._seq = self._last_order = 0

    @property
    def is_over(self) -> bool:
        """Whether the leader has ended the job."""
        return bool(self.order and self.order.stage == "end")

    async def follow(self, link: Link, leader: Host) -> Loss | None:
        """Obey ``leader`` until ``link`` ends. None if ``leader`` had no majority meanwhile, or has ended the job."""
        self._link, self.leader, self._last_contact, self._last_order = link, leader, now(), 0
        self.redirected, self.refusal = None, ""
        heartbeat = asyncio.ensure_future(self._send_heartbeats(link))
        self.send_status()
        led, reason = False, "its connection was closed"
        try:
            while True:
                message = messages.decode_from_leader(await link.read())
                self._last_contact = now()
                if isinstance(message, Redirect):
                    reason, self.redirected = "it no longer leads", message.to
                    self.refusal = message.refusal
                    break
                if isinstance(message, (Roster, RosterChange)):
                    if self._promises.accept(message):
                        self.send_status()  # the leader may wait for this acknowledgement
                elif message.seq > self._last_order:
                    led = led or message.leads
                    self._obey(message, link)
        except (OSError, messages.ProtocolError) as error:
            reason = str(error) or reason
        finally:
            heartbeat.cancel()
            if self._prober:
                self._prober.forget()
            self._link = self.leader = None
            silent = now() - self._last_contact >= self._timeout
            if not self.is_over:
                self.order = None
                self._node.set_order(None, None)
        if self.is_over or not led:
            return None
        return Loss(f"no heartbeat for {self._timeout:g} s" if silent else reason, silent)

    def send_status(self) -> None:
        """Send the status of this node to the leader, if there is one: on every change, and as the heartbeat."""
        if not self._link:
            return
        self._seq += 1
        promises, held = self._promises, self._promises.roster
        status = replace(
            self._node.status(),
            seq=self._seq,
            last_order=self._last_order,
            votes=promises.votes,
            seen=promises.seen,
            roster=held.round if held else -1,
            mark=held.mark if held else "",
            oldest=held.bases[0].round if held and held.bases else 0,
            wishes=promises.wishes,
            rhythm=promises.rhythm,
            probed=self._prober.probed if self._prober else 0,
            unreached=self._prober.unreached if self._prober else "",
        )
        self._link.send(status)

    def disconnect(self) -> None:
        if self._link:
            self._link.close()

    def _obey(self, order: Order, link: Link) -> None:
        self._last_order = order.seq
        self._promises.promise(order.round)
        if order.leads:
            self.last_led = now()
            self._promises.wish(order.wishes)
            self._promises.learn(order.rhythm)
        held = self._promises.roster
        if held and held.round > order.roster:
            link.send(held)
        elif order.plan and (not held or held.round < order.round):
            return  # without the roster of its round this node must not start: the leader sends it again
        if held and held.round == order.roster:
            self._promises.forget_bases_before(order.oldest)
        if self._prober:
            self._prober.obey(order, link.local, self.send_status)
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
