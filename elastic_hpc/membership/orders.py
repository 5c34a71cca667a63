"""What the leader has said to whom, so that only news is said. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from elastic_hpc.membership.messages import Order, Plan
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.roster import Roster, RosterChange

Sent = Order | Roster | RosterChange


class Orders:
    """To the agents, by connection."""

    def __init__(self) -> None:
        self.refused: dict[int, str] = {}
        """Connections whose agents are to leave, and why."""
        self._seq = 0
        self._said: dict[int, tuple[Any, ...]] = {}
        self._said_last: tuple[Any, ...] = ()
        self._rosters: dict[int, int] = {}
        self._since_beat: set[int] = set()

    def forget(self, conn: int) -> None:
        """Connection ``conn`` is gone."""
        self._since_beat.discard(conn)
        for said in (self.refused, self._said, self._rosters):
            said.pop(conn, None)

    def take(
        self,
        peers: Peers,
        order: Order,
        plans: Mapping[int, Plan],
        roster: Roster,
        change: RosterChange | None,
        *,
        beat: bool,
    ) -> dict[int, list[Sent]]:
        """``order`` with each node's own plan of ``plans``, where that is news, or with ``beat`` for everybody; before
        it ``roster``, if there is one and the leader leads, to those who do not hold it: as ``change`` to those who
        hold the one before. It is said again with the second beat after.
        """
        taken: dict[int, list[Sent]] = {}
        self._seq += 1
        order = replace(order, seq=self._seq)
        for conn, refusal in self.refused.items():
            if self._is_news(conn, (refusal,)):
                taken[conn] = [replace(order, stage="end", reason=refusal, outcome="failed", drain=False)]
        content = (order.stage, order.round, order.oldest, order.drain, order.leads, bool(plans))
        everybody = beat or content != self._said_last
        self._said_last = content
        for conn in peers if everybody else peers.keys() - self._said.keys():
            status = peers[conn].status
            plan = plans.get(status.node)
            if self._is_news(conn, (*content, plan)) or beat:
                taken[conn] = [replace(order, plan=plan) if plan else order]
                behind = order.leads and roster.bases and status.roster < roster.round
                if behind and (self._rosters.get(conn) != roster.round or (beat and conn not in self._since_beat)):
                    self._rosters[conn] = roster.round
                    self._since_beat.add(conn)
                    taken[conn].insert(0, change if change and status.mark == change.since else roster)
                elif beat:
                    self._since_beat.discard(conn)
        return taken

    def _is_news(self, conn: int, content: tuple[Any, ...]) -> bool:
        known, self._said[conn] = self._said.get(conn), content
        return known != content
