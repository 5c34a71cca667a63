"""The stores of the rounds, when opening a store never ends: a name server is gone, or a file system stalls."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import simulated
from cluster import wait_for
from torch.distributed import TCPStore

from elastic_hpc.agent import store
from elastic_hpc.agent.store import StoreHost
from elastic_hpc.membership.leader import Leader
from elastic_hpc.network import addresses, server
from elastic_hpc.network.server import LeaderServer


class Stalling:
    """Replaces TCPStore: its first ``stalls`` calls wait for ``released``."""

    def __init__(self, stalls: int) -> None:
        self.left, self.released, self.ports = stalls, threading.Event(), list[int]()

    def __call__(self, host: str, port: int, **options: Any) -> TCPStore:
        self.ports.append(port)
        if self.left:
            self.left -= 1
            assert self.released.wait(60)
        return TCPStore(host, port, **options)


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Stalling] = []

    def make(stalls: int) -> Stalling:
        made.append(Stalling(stalls))
        monkeypatch.setattr(store, "TCPStore", made[-1])
        return made[-1]

    yield make
    for stalling in made:
        stalling.released.set()


@pytest.fixture
def host() -> StoreHost:
    with addresses.listen_from(45000) as free:
        return StoreHost(free.getsockname()[1], ["127.0.0.1"])


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_stores_of_two_rounds_are_kept_and_older_stores_are_closed(host: StoreHost) -> None:
    async def run() -> None:
        ports = [await host.open(round) for round in (1, 2, 3)]
        await asyncio.to_thread(wait_for, lambda: not is_open(ports[0]))
        assert is_open(ports[1])
        assert is_open(ports[2])

    asyncio.run(run())


def test_another_store_is_opened_beside_a_late_store_which_is_closed_when_it_comes(host: StoreHost, stall: Any) -> None:
    stalling = stall(1)

    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(host.open(1), 0.1)
        port = await asyncio.wait_for(host.open(1), 10)
        late, _ = stalling.ports
        assert is_open(late), "it listens, but no worker is told of it"
        stalling.released.set()
        await asyncio.to_thread(wait_for, lambda: not is_open(late))
        assert port != late
        assert is_open(port)

    asyncio.run(run())


def test_the_number_of_attempts_is_bounded_and_the_first_successful_one_counts(host: StoreHost, stall: Any) -> None:
    stalling = stall(99)

    async def run() -> None:
        for _ in range(6):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(host.open(1), 0.1)
        assert len(stalling.ports) == 3
        stalling.released.set()
        port = await host.open(1)
        assert port in stalling.ports
        await asyncio.to_thread(wait_for, lambda: sum(map(is_open, stalling.ports)) == 1)
        assert is_open(port)

    asyncio.run(run())


def test_a_late_store_of_a_round_that_has_ended_is_closed_when_it_opens(host: StoreHost, stall: Any) -> None:
    stalling = stall(1)

    async def run() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(host.open(1), 0.1)
        port = await host.open(2)
        stalling.released.set()
        await asyncio.to_thread(wait_for, lambda: not is_open(stalling.ports[0]))
        assert is_open(port)

    asyncio.run(run())


class Record:
    """A recorder that keeps the events and writes nothing."""

    warning = ""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, fields: dict[str, Any]) -> None:
        self.events.append((name, fields))

    def __getattr__(self, _name: str) -> Any:
        return lambda *_, **__: None


def test_the_leader_is_notified_of_a_store_that_does_not_open_and_gets_the_next_one(
    host: StoreHost, stall: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STORE_TIMEOUT", 0.1)
    stalling = stall(1)

    async def run() -> None:
        policy = replace(simulated.POLICY, heartbeat_timeout=2.0)
        leader, record = Leader(policy, node=0, nproc=1, now=asyncio.get_running_loop().time(), granted=1), Record()

        async def act(*_: Any, **__: Any) -> None:
            pytest.fail("there is no verdict")

        serving = asyncio.ensure_future(LeaderServer(leader, record, host.open, act).run())
        for _ in range(600):
            if leader.wanted_store is None:
                break
            await asyncio.sleep(0.05)
        serving.cancel()
        assert leader.wanted_store is None, "the store is open"
        assert len(stalling.ports) == 2
        assert [fields for name, fields in record.events if name == "store_failed"] == [
            {"round": 1, "reason": "it did not open within 0.1 s"}
        ]

    asyncio.run(run())
