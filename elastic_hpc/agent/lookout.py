"""Looks regularly at what Slurm and the site say about the job. Only the leader's agent looks, for all nodes of the
job: Slurm gets few queries, however many nodes there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.leader import Leader

ASK_EVERY = 60.0
"""Seconds from one query of Slurm to the next."""

_UNTIL_IT_LEADS = 1.0
"""Seconds between two checks whether the leader has a majority."""


@dataclass(frozen=True)
class Outlook:
    """A look at ``what``, as the record calls it, every ``every`` seconds."""

    what: str
    every: float
    look: Callable[[Leader], Awaitable[None]]
    """Looks once, and gives the leader its inputs. Raises ElasticError or OSError if it cannot see anything: that does
    not mean that all is well.
    """


class Lookout:
    """Serves one leader until ``run`` is cancelled. A slow look delays no other look."""

    def __init__(self, looks: Sequence[Outlook], event: Callable[[str, dict[str, Any]], None]) -> None:
        self._looks = looks
        self._event = event

    async def run(self, leader: Leader, on_input: Callable[[], None]) -> None:
        """See ``network.server.Watches``."""
        await asyncio.gather(*(self._repeat(look, leader, on_input) for look in self._looks))

    async def _repeat(self, look: Outlook, leader: Leader, on_input: Callable[[], None]) -> None:
        is_seen = True
        while not leader.verdict:
            if not leader.leads:
                await asyncio.sleep(_UNTIL_IT_LEADS)
                continue
            try:
                await look.look(leader)
                is_seen = True
            except (ElasticError, OSError) as error:
                if is_seen:
                    self._event("unseen", {"what": look.what, "reason": str(error)})
                is_seen = False
            on_input()
            await asyncio.sleep(look.every)
