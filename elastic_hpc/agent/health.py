"""What Slurm, the site and the user say about the job's nodes: the leader learns which nodes to leave, and which may
stay after all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from elastic_hpc import slurm
from elastic_hpc.agent.lookout import ASK_EVERY, Outlook
from elastic_hpc.agent.threads import on_thread
from elastic_hpc.membership.departures import departures
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.strikes import EXPIRY
from elastic_hpc.record import health

LOOK_EVERY = 5.0
"""Seconds from one look at files to the next."""

_PLANNED = 10
"""Maintenance is planned long in advance: one query of the reservations follows this many queries of the nodes."""

_MAINTENANCE = "maintenance in Slurm"


class Watcher(NamedTuple):
    """A source that says which nodes not to use."""

    what: str
    every: float
    read: Callable[[set[str]], Awaitable[Mapping[str, str]]]
    """Takes the names of the nodes that matter. Returns, by node name, why not to use a node."""


Plans = Callable[[], Awaitable[Sequence[slurm.Maintenance]]]


class Health:
    """Serves one leader."""

    def __init__(self, sources: Sequence[Watcher], plans: Plans | None) -> None:
        self._planned: Sequence[slurm.Maintenance] = ()
        self._bad: dict[str, Mapping[str, str]] = {}
        """The last answer of each source."""
        self._told: set[str] = set()
        """Nodes that this leader was asked to leave."""
        self._silent = {source.what for source in sources}
        """Sources that have yet to answer."""
        self.outlooks = [Outlook(source.what, source.every, partial(self._ask, source)) for source in sources]
        if plans:
            self._silent.add(_MAINTENANCE)
            self.outlooks.append(Outlook(_MAINTENANCE, _PLANNED * ASK_EVERY, partial(self._ask_for, plans)))

    async def _ask(self, source: Watcher, leader: Leader) -> None:
        self._bad[source.what] = await source.read({*leader.peers.all_names, *leader.peers.unfit})
        self._tell(source.what, leader)

    async def _ask_for(self, plans: Plans, leader: Leader) -> None:
        self._planned = await plans()
        self._tell(_MAINTENANCE, leader)

    def _tell(self, what: str, leader: Leader) -> None:
        """``what`` was read: have the leader leave bad nodes, and keep nodes that are no longer bad. Nodes that an
        earlier leader left may stay only when all sources have answered.
        """
        self._silent.discard(what)
        now = asyncio.get_running_loop().time()
        before = leader.peers.unfit
        found = departures({*leader.peers.all_names, *before}, self._planned, self._bad.values(), time.time())
        for name, departure in found.items():
            leader.on_leave(name, departure.reason, now, exclude=True, give_back=True, by=departure.by)
        for name in before - found.keys():
            if name in self._told or not self._silent:
                leader.on_stay(name, now)
        self._told |= found.keys()


def health_of(notices: Path, folder: str | None, *, asks: bool, reserved: bool) -> Health:
    """``notices``: the folder of ``elastic-hpc notice``. ``folder``: the site's (``--health-dir``). ``asks``: Slurm's
    commands are available. ``reserved``: the job runs in a reservation, which may be the maintenance's.
    """
    sources = [Watcher("notices of nodes", LOOK_EVERY, lambda _: on_thread(_noticed, notices))]
    if folder:
        sources.append(Watcher(f"--health-dir {folder}", LOOK_EVERY, lambda _: on_thread(health.marked, Path(folder))))
    if asks:
        sources.append(
            Watcher("the state of the nodes in Slurm", ASK_EVERY, lambda names: on_thread(slurm.out_of_service, names))
        )
    return Health(sources, (lambda: on_thread(slurm.maintenance)) if asks and not reserved else None)


def _noticed(folder: Path) -> dict[str, str]:
    try:
        return health.marked(folder, time.time() - EXPIRY.total_seconds())
    except FileNotFoundError:  # there is no notice
        return {}
