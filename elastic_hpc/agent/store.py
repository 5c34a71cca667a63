"""The c10d stores at which workers meet: a new TCPStore for every round, on the leader's host.

Opening a store may block for as long as a name server takes to answer, so each store is opened on a thread of its own,
which can be abandoned. In a store that is used for several rounds, new ranks would read addresses of dead peers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import TCPStore

from elastic_hpc.network.addresses import LOOPBACK, listen_from, own

_PORTS = 32
"""Number of ports that the rounds use in turn, so that a late worker of an old round finds no store."""


class StoreHost:
    """Opens the stores of the rounds, and keeps those of the last two rounds."""

    def __init__(self, port: int, published: Sequence[str]) -> None:
        """``published``: the addresses of this node. torch's store has one socket, so with several addresses the
        store listens on all interfaces.
        """
        self._port = port
        self._host = published[0] if len(published) == 1 and own(published) else ""
        self._stores: dict[int, TCPStore] = {}

    def open(self, round: int) -> Future[int]:
        """Open the store of ``round``. The result is the port on which it listens."""
        opened: Future[int] = Future()

        def work() -> None:
            try:
                listener = listen_from(self._port + (round - 1) % _PORTS, self._host)
                port = listener.getsockname()[1]
                store = TCPStore(
                    self._host or LOOPBACK,
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=60),
                    master_listen_fd=listener.detach(),
                )
            except Exception as error:  # noqa: BLE001 - raised where the result is waited for
                opened.set_exception(error)
                return
            for old in [r for r in self._stores if r < round - 1]:
                del self._stores[old]
            self._stores[round] = store
            opened.set_result(port)

        threading.Thread(target=work, name=f"store-{round}", daemon=True).start()
        return opened
