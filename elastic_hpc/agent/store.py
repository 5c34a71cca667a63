"""The c10d stores that workers meet at: a fresh TCPStore for every round, on the leader's host.

A store may block for as long as a name server does (torch-facts: reverse look-ups), so each is opened on a thread of
its own that can be abandoned. Reusing one store over rounds makes new ranks read dead peers' addresses.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import TCPStore

from elastic_hpc.network.addresses import listen_from

_PORTS = 32
"""Consecutive rounds use different ports in this range, so that a straggler of an old round meets nobody."""


class StoreHost:
    """Opens the stores of the rounds; keeps this round's and the next one's."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stores: dict[int, TCPStore] = {}

    def open(self, round: int) -> Future[int]:
        """Start the store of ``round``; the future gives the port it listens on."""
        opened: Future[int] = Future()

        def work() -> None:
            try:
                listener = listen_from(self._port + (round - 1) % _PORTS)
                port = listener.getsockname()[1]
                store = TCPStore(
                    "127.0.0.1",
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=60),
                    master_listen_fd=listener.detach(),
                )
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for the store
                opened.set_exception(error)
                return
            for old in [r for r in self._stores if r < round - 1]:
                del self._stores[old]
            self._stores[round] = store
            opened.set_result(port)

        threading.Thread(target=work, name=f"store-{round}", daemon=True).start()
        return opened
