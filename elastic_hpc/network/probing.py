"""A node tries to reach others on the network of its workers, when the leader wants to know (``membership.links``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from elastic_hpc.membership.links import partners
from elastic_hpc.membership.messages import Order
from elastic_hpc.membership.nodes import numbers, spans
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Hosts
from elastic_hpc.network.node import Transport
from elastic_hpc.network.tasks import end

_AT_ONCE = 8
"""Number of connections to open at a time."""

_TRIES = 2
"""Number of failed attempts after which a node counts as not reached."""

_AT_MOST = 12.0
"""Seconds after which this node answers with what it knows: less than the leader waits."""


class Prober:
    """Carries out the leader's probes on the node ``me``. It dials the control ports of agents, which listen at all
    addresses of their node that others use.
    """

    def __init__(self, me: Host, transport: Transport, promises: Promises) -> None:
        """``promises`` hold the roster, with the addresses of the other nodes."""
        self._me, self._transport, self._promises = me, transport, promises
        self.probed = 0
        self.unreached = ""
        """The answer, for ``Status``."""
        self._wanted = 0
        """The number of the requested probe, 0 for none."""
        self._task: asyncio.Task[None] | None = None

    def obey(self, order: Order, local: str, answer: Callable[[], None]) -> None:
        """``order`` came, on a connection from this node's address ``local``. ``answer()`` is called when there is an
        answer to send.
        """
        wanted = order.probe if order.leads else 0
        if wanted == self._wanted:
            return
        self.forget()
        self._wanted = wanted
        if local.startswith("127."):  # the leader's own connection, while its interface is down
            local = self._me.addresses[0]
        if wanted and self._me.node in (among := numbers(order.among)):
            self._task = asyncio.ensure_future(self._probe(order.probe, among, local, answer))

    def forget(self) -> None:
        """The leader is lost, or no longer wants an answer."""
        if self._task:
            self._task.cancel()
        self._task, self._wanted, self.probed, self.unreached = None, 0, 0, ""

    async def _probe(self, number: int, among: tuple[int, ...], local: str, answer: Callable[[], None]) -> None:
        hosts = Hosts.of(self._promises.roster.hosts if self._promises.roster else ())
        others = [hosts.at(node) for node in partners(self._me.node, among) if node in hosts.rows]
        slots, unreached = asyncio.Semaphore(_AT_ONCE), list[int]()

        async def reach(host: Host) -> None:
            async with slots:
                for _ in range(_TRIES):
                    if await self._transport.reaches(host, local):
                        return
            unreached.append(host.node)

        tries = [asyncio.ensure_future(reach(host)) for host in others]
        if tries:
            try:
                await asyncio.wait(tries, timeout=_AT_MOST)
            finally:
                await end(tries)
        self.probed, self.unreached = number, spans(sorted(unreached))
        answer()
