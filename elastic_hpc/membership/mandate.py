"""Whether a leader leads: which rounds' members must agree, and which roster each node holds. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from elastic_hpc.membership.election import Base, extended, has_quorum, relevant
from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.policy import QuorumView
from elastic_hpc.membership.roster import Roster, RosterChange


class Mandate:
    """The mandate of the first leader of a job (``inherited`` is false), or of a leader that takes over ``roster``.
    ``granted`` while enough nodes agree.
    """

    def __init__(self, roster: Roster, *, inherited: bool, now: float) -> None:
        self.roster = roster
        """What the agents hold since the last round was formed."""
        self.change: RosterChange | None = None
        """The difference between ``roster`` and the previous roster; None if this leader has formed no round."""
        self.granted = self.ever_granted = not inherited
        self._granted_at = self._last_granted = now
        self._bases = roster.bases
        self._acknowledged: dict[int, int] = {}
        """By node: round of the newest roster that the node is known to hold."""
        self._has_new_acknowledgements = False
        """``_bases`` may hold bases that no longer count. ``bases`` removes them when it is read next: a thousand nodes
        acknowledge a roster one after the other.
        """

    @property
    def bases(self) -> tuple[Base, ...]:
        """The rounds whose members must agree."""
        if self._has_new_acknowledgements:
            self._has_new_acknowledgements, self._bases = False, relevant(self._bases, self._acknowledged)
        return self._bases

    @property
    def oldest(self) -> int:
        """The oldest round whose members must agree."""
        return self.bases[0].round if self.bases else 0

    def on_status(self, status: Status) -> None:
        """A node has sent ``status``, which acknowledges the roster of this leader unless the node has received an
        order of a later round: the leader of that round may not know this roster. A node that has lost its promises
        does not know which orders it has received.
        """
        acknowledges = status.votes and status.roster == self.roster.round >= status.seen
        if acknowledges and self._acknowledged.get(status.node) != status.roster:
            self._acknowledged[status.node] = status.roster
            self._has_new_acknowledgements = True

    def on_roster(self, roster: Roster) -> bool:
        """An agent holds ``roster``. True if it is of a later round: then this leader adopts it."""
        if roster.round <= self.roster.round:
            return False
        self.roster, self._bases = roster, roster.bases
        self._acknowledged, self._has_new_acknowledgements = {}, False
        return True

    def on_form(self, roster: Roster) -> None:
        """A round is formed. ``roster`` has the base of that round alone; the roster for the agents also has the older
        bases that still count.
        """
        self._bases = extended(self.bases, *roster.bases)
        before, self.roster = self.roster, replace(roster, bases=self._bases)
        self.change = self.roster.change_from(before)

    def is_settled(self, formed: Collection[int]) -> bool:
        """Whether no other world could be formed without members of this world, ``formed``: too few members of the
        older rounds do not hold its roster. Its own members hold the roster before they start; nodes that are left
        over, as MAX is reached, must have acknowledged it.
        """
        if len(self.bases) <= 1:
            return True
        return len(relevant(self.bases, self._acknowledged | dict.fromkeys(formed, self.roster.round))) <= 1

    def on_freeze(self, now: float) -> None:
        """This leader was frozen until ``now``: from then on it has a heartbeat timeout to regain the mandate."""
        self._last_granted = now

    def renew(self, joined: Collection[Status], agreeing: Collection[int], now: float, *, stale: bool) -> bool:
        """Grant the mandate if ``agreeing``, of the nodes that have ``joined``, are enough, else withdraw it. True if
        it is granted for the first time. ``stale``: the world runs, and was not settled in time.
        """
        quorum = has_quorum(self.bases, agreeing) and not stale
        quorum = quorum and all(status.roster <= self.roster.round for status in joined)
        if quorum and not self.granted:
            self._granted_at = now
        if quorum:
            self._last_granted = now
        is_first = quorum and not self.ever_granted
        self.granted, self.ever_granted = quorum, quorum or self.ever_granted
        return is_first

    def view(
        self, joined: Mapping[int, Status], live: Collection[int], now: float, *, running: bool, confirming: bool
    ) -> QuorumView:
        """``joined``: the statuses of the nodes that have joined. ``running``: a round runs. ``confirming``: as in
        ``QuorumView``.
        """
        expected = set[int]()
        if self.roster.bases and not running:
            expected = set(self.roster.members).difference(live, {self.roster.bases[-1].leader})
        settled = running and all(self._knows(joined.get(node)) for node in self.roster.bases[-1].members)
        return QuorumView(
            self.granted, now - self._granted_at, now - self._last_granted, len(expected), confirming, settled
        )

    def _knows(self, status: Status | None) -> bool:
        """Whether a node knows that only the members of the last round must agree."""
        return status is not None and status.roster == status.oldest == self.roster.round
