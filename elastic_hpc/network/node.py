"""What the parts of a session need of their node: its agent, its network, its clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from elastic_hpc.errors import JobEnded
from elastic_hpc.membership.messages import Order, Status
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.network.channel import Link
from elastic_hpc.network.identity import RunIsOver
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.record.endpoint import Published


def now() -> float:
    """Seconds on the clock of the running event loop; tests simulate that clock."""
    return asyncio.get_running_loop().time()


class Transport(Protocol):
    """``channel.Network``, or a simulated one."""

    on_stranger: Callable[[str, str], None]
    on_over: Callable[[RunIsOver], None]

    async def serve(self, attend: Callable[[Link], Awaitable[None]]) -> None: ...
    async def dial(self, host: Host) -> Link: ...
    async def reaches(self, host: Host, local: str) -> bool:
        """Whether a connection to ``host`` can be opened on the network of the workers. Unless the user has named an
        interface for them, that is the network of this node's address ``local``.
        """


class Node(Protocol):
    """The agent of this node (``agent.bridge.Control``)."""

    def status(self) -> Status:
        """What the workers do. The follower fills in the fields that belong to its connection."""

    def set_order(self, order: Order | None, link: Link | None) -> None:
        """The leader's latest order, which came over ``link``. None without a leader: the workers must stop."""

    def ended(self, over: JobEnded) -> None: ...
    async def published(self) -> Published | None:
        """The leader that the run directory names, and agents that may know of a later one. Raises RunIsOver if that
        leader belongs to a later run.
        """

    async def give_up(
        self, roster: Roster | None, waited: float, why: str, *, patient: bool, others: Sequence[str]
    ) -> JobEnded | None:
        """This agent had no leader for ``waited`` seconds, because of ``why``; without a ``roster`` it never had one.
        Unless ``patient``, requeue or end the job. ``others``: the names of the other nodes that are left, as far as
        this agent knows. Raises RunIsOver like ``published``.
        """

    def lead(self, promises: Promises, reason: str) -> LeaderServer:
        """A leader on this node: the first leader of the job, or a leader that takes over, because of ``reason``, with
        the roster of ``promises``.
        """
