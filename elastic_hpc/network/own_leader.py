"""The leader on this node, if this node leads or asks for a majority."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.promises import Promises
from elastic_hpc.network.server import LeaderServer

log = logging.getLogger(__name__)


class OwnLeader:
    """``make_server(promises, reason)`` makes the first leader, or a leader that takes over (``Node.lead``)."""

    def __init__(self, make_server: Callable[[Promises, str], LeaderServer], promises: Promises) -> None:
        self._make_server = make_server
        self._promises = promises
        self.server: LeaderServer | None = None
        """None while this node neither leads nor asks for a majority."""
        self._task: asyncio.Task[str] | None = None
        self._latest: Leader | None = None
        """The leader that serves, or served last."""

    def begin(self, reason: str) -> None:
        """Lead, or ask for a majority."""
        self.server = self._make_server(self._promises, reason)
        self._latest = self.server.leader
        self._task = asyncio.ensure_future(self.server.run())
        self._task.add_done_callback(self._on_done)

    def stop(self) -> None:
        self.cancel()
        self.server = self._task = None

    def cancel(self) -> None:
        """End the leader's task; the answers to peers that are still connected do not change."""
        if self._task:
            self._task.cancel()

    async def finish(self) -> None:
        """With a verdict, wait until the other agents have left."""
        if self._task and self.server and self.server.leader.verdict:
            await self._task

    def is_candidate(self) -> bool:
        """Whether this node asks for a majority and has not had one yet."""
        return bool(self.server and not self.server.leader.has_led)

    @property
    def abdicated(self) -> str:
        """Why the former leader on this node stopped without a verdict; empty if it did not."""
        return self._latest.abdicated if self._latest else ""

    def _on_done(self, task: asyncio.Task[str]) -> None:
        if not task.cancelled() and task.exception():
            log.error("the leader failed", exc_info=task.exception())
        if task is self._task and not (self.server and self.server.leader.verdict):
            self.server = self._task = None
