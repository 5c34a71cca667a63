"""What the leader has said to whom, so that only news is said. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elastic_hpc.peers import Peers
from elastic_hpc.protocol import Order, Plan, Roster


class Orders:
    """To the agents, by connection."""

    def __init__(self) -> None:
        self.refused: dict[int, str] = {}
        """Connections whose agents are to leave, and why."""
        self._seq = 0
        self._said: dict[int, tuple[Any, ...]] = {}
        self._rosters: dict[int, int] = {}

    def forget(self, conn: int) -> None:
        """Connection ``conn`` is gone."""
        for said in (self.refused, self._said, self._rosters):
            said.pop(conn, None)

    def take(
        self, peers: Peers, order: Order, plans: Mapping[int, Plan], roster: Roster, *, beat: bool
    ) -> dict[int, list[Order | Roster]]:
        """``order`` with each node's own plan of ``plans``, where that is news, or with ``beat`` for everybody; before
        it ``roster``, if there is one and the leader leads, to those who do not hold it.
        """
        taken: dict[int, list[Order | Roster]] = {}
        for conn, refusal in self.refused.items():
            if self._is_news(conn, (refusal,)):
                taken[conn] = [
                    self._numbered(replace(order, stage="end", reason=refusal, outcome="failed", drain=False))
                ]
        for conn, peer in peers.items():
            plan = plans.get(peer.status.node)
            news = self._is_news(conn, (order.stage, order.round, plan, order.oldest, order.drain, order.leads))
            if beat or news:
                taken[conn] = [self._numbered(replace(order, plan=plan))]
                behind = order.leads and roster.bases and peer.status.roster < roster.round
                if behind and (beat or self._rosters.get(conn) != roster.round):
                    self._rosters[conn] = roster.round
                    taken[conn].insert(0, roster)
        return taken

    def _is_news(self, conn: int, content: tuple[Any, ...]) -> bool:
        known, self._said[conn] = self._said.get(conn), content
        return known != content

    def _numbered(self, order: Order) -> Order:
        self._seq += 1
        return replace(order, seq=self._seq)
