"""The c10d stores at which workers meet: a new TCPStore for every round, on the leader's host.

Opening a store may block for as long as a name server takes to answer, so each attempt runs on a thread of its own,
which can be abandoned. With one store for several rounds, new ranks would read addresses of dead peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import TCPStore

from elastic_hpc.agent.threads import on_thread, start
from elastic_hpc.network.addresses import LOOPBACK, listen_from, own

_PORTS = 32
"""Number of ports that the rounds use in turn, so that a late worker of an old round finds no store."""

_MOST_ATTEMPTS = 3
"""Maximum number of attempts at the same time to open the store of one round."""


class _Opened:
    """A store that listens on ``host``, on the first free port from ``port`` upwards."""

    def __init__(self, host: str, port: int) -> None:
        host = host if own([host]) else ""  # this machine may no longer have that address
        listener = listen_from(port, host)
        self.port = int(listener.getsockname()[1])
        self._stores = [
            TCPStore(
                host or LOOPBACK,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=60),
                master_listen_fd=listener.detach(),
            )
        ]

    def close(self) -> None:
        """Close the store by the removal of the last reference. That may block, so it happens on another thread."""
        start(self._stores.clear)


class StoreHost:
    """Opens the stores of the rounds, and keeps the stores of the last two rounds. Used by one event loop alone."""

    def __init__(self, port: int, published: Sequence[str]) -> None:
        """``published``: the addresses of this node. torch's store has one socket, so with several addresses the
        store listens on all interfaces.
        """
        self._port = port
        self._host = published[0] if len(published) == 1 else ""
        self._stores: dict[int, _Opened] = {}
        self._attempts: dict[int, list[asyncio.Future[_Opened]]] = {}
        """By round; only attempts of the last round for which ``open`` was called."""

    async def open(self, round: int) -> int:
        """The port of the store of ``round``. If a caller stops waiting and calls again, a second attempt begins, on
        another port, while the first one continues. The first store that opens is used, the others are closed.
        """
        for old in [r for r in self._attempts if r != round]:
            _abandon(self._attempts.pop(old))
        attempts = self._attempts.setdefault(round, [])
        if len(attempts) < _MOST_ATTEMPTS and not any(attempt.done() for attempt in attempts):
            attempts.append(asyncio.ensure_future(on_thread(_Opened, self._host, self._port + (round - 1) % _PORTS)))
        done, _ = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
        attempt = min(done, key=lambda attempt: attempt.exception() is not None)
        attempts.remove(attempt)
        opened: _Opened = attempt.result()
        _abandon(self._attempts.pop(round, []))
        for old in [r for r in self._stores if r < round - 1]:
            self._stores.pop(old).close()
        self._stores[round] = opened
        return opened.port


def _abandon(attempts: list[asyncio.Future[_Opened]]) -> None:
    """Close the stores of ``attempts`` as soon as they are open."""
    for attempt in attempts:
        attempt.add_done_callback(_close_late)


def _close_late(attempt: asyncio.Future[_Opened]) -> None:
    if not attempt.cancelled() and not attempt.exception():
        attempt.result().close()
