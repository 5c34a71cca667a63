"""What a leader has sent to each agent, so that it sends only what has changed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from elastic_hpc.membership.messages import Order, Plan, Redirect
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.policy import Outcome
from elastic_hpc.membership.roster import Roster, RosterChange

ToAgent = Order | Roster | RosterChange | Redirect


@dataclass(frozen=True)
class Refusal:
    """Why an agent may not take part."""

    reason: str
    final: bool = True
    """The agent has to leave; else it may connect again later."""
    is_new: bool = True
    """The same process has not been refused before."""
    let_go: bool = False
    """The agent has taken part, and is no longer needed: that is no failure."""


class Orders:
    """Orders to the agents, by connection."""

    def __init__(self) -> None:
        self._refused: dict[int, Refusal] = {}
        """By connection: the agents that may not take part; an agent that may connect again, only until the refusal is
        sent.
        """
        self._seq = 0
        self._sent: dict[int, tuple[Any, ...]] = {}
        """By connection: the content of the last order, without ``seq``, ``reason`` and ``roster``."""
        self._content: tuple[Any, ...] = ()
        """What the last orders had in common."""
        self._rosters_sent: dict[int, int] = {}
        """By connection: the round of the last roster."""
        self._unacknowledged: set[int] = set()
        """Connections that were sent the roster since the last beat: its acknowledgement may be on its way."""

    @property
    def next(self) -> int:
        """The number of the orders that are sent next."""
        return self._seq + 1

    def is_refused(self, conn: int) -> bool:
        """Whether the agent of ``conn`` has been refused permanently."""
        return conn in self._refused and self._refused[conn].final

    def refuse(self, conn: int, refusal: Refusal) -> None:
        """The agent of ``conn`` may not take part."""
        self._refused[conn] = refusal

    def forget(self, conn: int) -> None:
        """Connection ``conn`` is gone."""
        self._unacknowledged.discard(conn)
        for by_conn in (self._refused, self._sent, self._rosters_sent):
            by_conn.pop(conn, None)

    def take(
        self,
        peers: Peers,
        order: Order,
        plans: Mapping[int, Plan],
        roster: Roster,
        change: RosterChange | None,
        *,
        beat: bool,
    ) -> dict[int, list[ToAgent]]:
        """What to send now, by connection.

        An agent is sent ``order``, with its node's plan from ``plans``, if that differs from the last order that it was
        sent; with ``beat`` every agent is. An agent that does not hold ``roster`` is sent the roster before the order,
        if this leader leads: only the ``change``, if the agent holds the previous roster. The roster is sent again with
        the second beat after, unless the agent has acknowledged it by then.
        """
        taken: dict[int, list[ToAgent]] = {}
        self._seq += 1
        order = replace(order, seq=self._seq)
        for conn, refusal in list(self._refused.items()):
            if not refusal.final:
                taken[conn] = [Redirect(None, refusal=refusal.reason)]
                del self._refused[conn]
            elif self._is_news(conn, (refusal,)):
                outcome: Outcome = "finished" if refusal.let_go else "failed"
                end = replace(order, stage="end", reason=refusal.reason, outcome=outcome, alone=True)
                taken[conn] = [replace(end, drain=False, new_world=False)]
        told = (order.drain, order.new_world, order.live, order.wishes.number, order.probe)
        content = (order.stage, order.round, order.oldest, *told, order.leads, bool(plans))
        to_all = beat or content != self._content
        self._content = content
        for conn in peers if to_all else peers.keys() - self._sent.keys():
            status = peers[conn].status
            plan = plans.get(status.node)
            if self._is_news(conn, (*content, plan)) or beat:
                taken[conn] = [replace(order, plan=plan) if plan else order]
                is_behind = order.leads and roster.bases and status.roster < roster.round
                is_sent = self._rosters_sent.get(conn) == roster.round
                if is_behind and (not is_sent or (beat and conn not in self._unacknowledged)):
                    self._rosters_sent[conn] = roster.round
                    self._unacknowledged.add(conn)
                    taken[conn].insert(0, change if change and status.mark == change.previous else roster)
                elif beat:
                    self._unacknowledged.discard(conn)
        return taken

    def _is_news(self, conn: int, content: tuple[Any, ...]) -> bool:
        before, self._sent[conn] = self._sent.get(conn), content
        return before != content
