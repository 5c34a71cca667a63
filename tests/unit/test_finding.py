"""An agent that stops looking for the leader leaves no connection open."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import Message, Redirect
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Base, Host, Roster
from elastic_hpc.network.finding import Finder
from elastic_hpc.network.tasks import end, within

DEAD, SILENT, SLOW, ME = HOSTS = [Host(node, f"n{node}", ("127.0.0.1",), 1) for node in range(4)]


class Peer:
    """A connection to an agent that answers after a moment that it leads."""

    open = False

    def send(self, *_: Message) -> None:
        self.open = True

    async def read(self) -> bytes:
        await asyncio.sleep(0.01)
        return messages.encode(Redirect(SLOW, leads=True))

    def close(self) -> None:
        self.open = False


def test_a_connection_that_opens_as_the_search_ends_is_closed() -> None:
    """``asyncio.wait_for`` of Python 3.11 loses a cancellation that comes together with a result."""

    async def story() -> None:
        peer = Peer()
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        dialled = asyncio.Event()

        async def dial(host: Host) -> Peer:
            if host == DEAD:
                raise ConnectionRefusedError
            if host == SILENT:
                await asyncio.sleep(60)
            dialled.set()
            await asyncio.wait_for(connected, 60)
            return peer

        promises = Promises()
        promises.roster = Roster(1, HOSTS, (Base(1, 0, (0, 1, 2, 3)),), 0, 0, (0, 1, 2, 3))
        network: Any = SimpleNamespace(dial=dial)
        nobody: Any = SimpleNamespace(server=None)
        search = asyncio.ensure_future(Finder(ME, nobody, network, promises, nobody, 10.0).find())
        await dialled.wait()
        connected.set_result(None)
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)
        assert not peer.open

    asyncio.run(story())


def test_a_task_that_is_cancelled_as_its_result_arrives_does_not_continue() -> None:
    async def story() -> None:
        result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        after: list[str] = []

        async def work() -> None:
            await within(60, result)
            after.append("continued")

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        result.set_result(None)
        task.cancel()
        await end([task])
        assert task.cancelled()
        assert after == []

    asyncio.run(story())
