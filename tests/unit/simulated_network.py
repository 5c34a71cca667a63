"""The network and the clock of simulated jobs: messages are delayed, reordered, dropped and doubled, links can be
cut, and time jumps to the next event.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import Order, Status
from elastic_hpc.membership.roster import Host, Roster, RosterChange
from elastic_hpc.network.identity import RunIsOver

if TYPE_CHECKING:
    from simulated import Job, SimNode


OWN_ON_EVERY_NODE = ("127.0.0.1", "172.17.0.1")
"""Addresses that lead to the agent itself: loopback and Docker's bridge."""


class _Jump(selectors.SelectSelector):
    """Advances the simulated time instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is left to happen"
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


class SimLink:
    """One end of a connection."""

    def __init__(self, job: Job, mine: SimNode, theirs: SimNode) -> None:
        self.job, self.mine, self.theirs = job, mine, theirs
        self.other: SimLink
        self.identity = theirs.identity
        self.peer, self.local = f"10.0.0.{theirs.index}", f"10.0.0.{mine.index}"
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    async def read(self) -> bytes:
        line = None if self.closed else await self.inbox.get()
        while self.mine.frozen:
            await asyncio.sleep(0.5)
        if line is None:
            self.inbox.put_nowait(None)
            raise ConnectionResetError("the connection was closed")
        return line

    def send(self, *sent: messages.Message) -> None:
        for message in sent:
            self._send(message)

    def _send(self, message: messages.Message) -> None:
        if self.closed or self.mine.dead:
            return
        dice = self.job.random.random()
        lossy = isinstance(message, (Status, Order, Roster, RosterChange))
        copies = 0 if lossy and dice < self.job.loss else 2 if lossy and dice < 2 * self.job.loss else 1
        for _ in range(copies):
            self._later(messages.encode(message))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.inbox.put_nowait(None)
            if not self.mine.dead:
                self._later(None)

    def _later(self, line: bytes | None) -> None:
        delay = self.job.latency()
        if line is None:
            delay += 1.5  # earlier messages arrive first
        asyncio.get_running_loop().call_later(delay, self._arrive, line)

    def _arrive(self, line: bytes | None) -> None:
        if self.job.connected(self.mine, self.theirs) and not self.theirs.dead:
            if line is None:
                self.other.closed = True
            self.other.inbox.put_nowait(line)


@dataclass
class SimNetwork:
    job: Job
    node: SimNode
    on_stranger: Callable[[str, str], None] = lambda _addr, _reason: None
    on_over: Callable[[RunIsOver], None] = lambda _over: None

    async def serve(self, attend: Callable[[Any], Awaitable[None]]) -> None:
        self.node.attend = attend

    async def dial(self, host: Host) -> SimLink:
        problem: Exception = ConnectionRefusedError("no address to dial")
        for address in host.addresses:
            try:
                return await self._dial(address, host)
            except (OSError, asyncio.TimeoutError, messages.ProtocolError) as error:
                problem = error
        raise problem

    async def reaches(self, host: Host, local: str) -> bool:
        assert local == f"10.0.0.{self.node.index}"
        target = self.job.at[host.port]
        await asyncio.sleep(self.job.latency())
        if self.job.connected(self.node, target) and self.job.connected(target, self.node) and target.dead != "power":
            return not target.dead
        await asyncio.sleep(2.5)
        return False

    async def _dial(self, address: str, host: Host) -> SimLink:
        target = self.node if address in OWN_ON_EVERY_NODE else self.job.at[host.port]
        await asyncio.sleep(self.job.latency())
        while target.frozen and not target.dead:
            await asyncio.sleep(0.5)
        both = self.job.connected(self.node, target) and self.job.connected(target, self.node)
        if not both or target.dead == "power":
            await asyncio.sleep(1.0)
            raise asyncio.TimeoutError
        if target.dead or target.attend is None:
            raise ConnectionRefusedError
        try:
            target.identity.check(self.node.identity)
        except RunIsOver as over:
            target.network.on_over(over)
        except messages.ProtocolError:
            pass
        self.node.identity.check(target.identity)
        self.node.identity.check_answer(target.identity, host.node)
        mine, theirs = SimLink(self.job, self.node, target), SimLink(self.job, target, self.node)
        mine.other, theirs.other = theirs, mine
        self.node.links.append(mine)
        target.links.append(theirs)
        target.spawn(target.attend(theirs))
        return mine
