"""Whether a leader leads: which rounds' members must agree to it, and who is known to hold what. Pure."""

from __future__ import annotations

from collections.abc import Collection

from elastic_hpc.membership.election import Base, extended, has_quorum, relevant
from elastic_hpc.membership.messages import Status
from elastic_hpc.membership.roster import Roster, RosterChange


class Mandate:
    """Of the first leader of a job (``inherited`` is false), or of one that takes over ``roster``. It is ``granted``
    while enough nodes agree.
    """

    def __init__(self, roster: Roster, *, inherited: bool, now: float) -> None:
        self.roster = roster
        """What the agents hold since the last round was formed."""
        self.change: RosterChange | None = None
        """What has made ``roster`` of the one before; None if this leader has not formed it."""
        self._bases = roster.bases
        self._heard = False
        self.granted = self.ever_granted = not inherited
        self.since = self.last_granted = now
        self._held: dict[int, int] = {}  # newest roster that each node is known to hold

    @property
    def bases(self) -> tuple[Base, ...]:
        """Those whose members must agree."""
        if self._heard:  # looked at when it is asked for: a thousand nodes say one after the other what they hold
            self._heard, self._bases = False, relevant(self._bases, self._held)
        return self._bases

    def is_member(self, node: int) -> bool:
        """Whether ``node`` belongs to a round that counts."""
        return any(node in base.members for base in self.bases)

    @property
    def oldest(self) -> int:
        """Members of rounds before this one are not asked any more."""
        return self.bases[0].round if self.bases else 0

    @property
    def last(self) -> Base | None:
        """The round that runs or, while one is gathered, the one before it."""
        return self.roster.bases[-1] if self.roster.bases else None

    def on_status(self, status: Status) -> None:
        if status.roster == self.roster.round >= status.seen:  # else it may be bound to a round that ignores this one
            self._heard = self._heard or self._held.get(status.node) != status.roster
            self._held[status.node] = status.roster

    def on_roster(self, roster: Roster) -> bool:
        """Whether ``roster``, which an agent knows, is a later one; it is the one to inherit then."""
        if roster.round <= self.roster.round:
            return False
        self.roster, self._bases, self._held, self._heard = roster, roster.bases, {}, False
        return True

    def add(self, base: Base) -> tuple[Base, ...]:
        """A round is being formed; its members count too from now on. The roster is to follow."""
        self._bases = extended(self.bases, base)
        return self._bases

    def hand_out(self, roster: Roster) -> None:
        """The roster of that round."""
        self.roster, self.change = roster, roster.since(self.roster)

    def is_settled(self, formed: Collection[int]) -> bool:
        """Whether nobody could form another world without the members of this one, ``formed``: too few of the older
        rounds' members do not hold it. Members hold it before they start; nodes that are left over, as MAX is reached,
        have to say so.
        """
        if len(self.bases) <= 1:
            return True
        return len(relevant(self.bases, self._held | dict.fromkeys(formed, self.roster.round))) <= 1

    def renew(self, joined: Collection[Status], agreeing: Collection[int], now: float, *, stale: bool) -> bool:
        """Look whether enough of those who have ``joined`` are ``agreeing``; True if that makes a leader of one who
        never was. ``stale``: the world runs, and could not be settled in time.
        """
        quorum = has_quorum(self.bases, agreeing) and not stale
        quorum = quorum and all(status.roster <= self.roster.round for status in joined)
        if quorum and not self.granted:
            self.since = now
        if quorum:
            self.last_granted = now
        news = quorum and not self.ever_granted
        self.granted, self.ever_granted = quorum, quorum or self.ever_granted
        return news
