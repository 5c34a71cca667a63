"""What a node has promised to the leaders that its agent obeyed. Pure.

Like Raft's persisted vote, a promise outlives the agent that made the promise: an agent stores a promise before it
sends any message that depends on the promise, and an agent that is restarted on the node begins with the stored
promises. ``agent.promise_file`` stores the promises in a file of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from elastic_hpc.membership.hangs import NO_RHYTHM, Rhythm
from elastic_hpc.membership.messages import MALFORMED, ProtocolError, decode, decode_from_leader
from elastic_hpc.membership.roster import Roster, RosterChange, json_line
from elastic_hpc.membership.wishes import NO_WISHES, Wishes

ROOM = 256
"""Each node has room for the roster of a job with at least this many nodes, even if the job began with fewer."""


class Promises:
    """The promises of one node, which its agent and the leader on it share. ``election`` explains their purpose."""

    def __init__(
        self, keep: Callable[[bytes], None] = lambda _: None, kept: bytes = b"", *, votes: bool = True
    ) -> None:
        """``keep`` stores the bytes that the next agent of this node gets as ``kept``. Without ``votes`` this node
        trains like any other, but no leader counts its agreement. Raises ProtocolError if ``kept`` is damaged.
        """
        self._keep = keep
        self.votes = votes
        self.seen = 0
        """The highest round of all orders that this node has received. Of earlier rounds it acknowledges no roster."""
        self.roster: Roster | None = None
        """The newest roster that this node has received, or has sent as the leader."""
        self.wishes = NO_WISHES
        """The latest wishes that this node has received."""
        self.rhythm = NO_RHYTHM
        """What this node last received about the job's signs of life. A restarted agent does not have that."""
        self._lines: list[bytes] = []
        """The roster as it is stored, with all its bases: a roster, and the changes that were received since."""
        self._oldest = 0
        """No base of an earlier round than this can decide."""
        if kept:
            first, *rest = kept.splitlines(keepends=True)
            before, news = decode(first), list(map(decode_from_leader, rest))
            numbers = before.get("seen"), before.get("oldest")
            held = all(isinstance(entry, (Roster, RosterChange)) and self._hold(entry) for entry in news)
            if not (held and all(type(number) is int for number in numbers)):
                raise ProtocolError(f"not what a node has promised: {kept[:60]!r}")
            self.votes, self.seen = votes and bool(before.get("votes")), before["seen"]
            with suppress(*MALFORMED):
                self.wishes = Wishes.of(before["wishes"])
            self.forget_bases_before(before["oldest"])
        self._write()

    def promise(self, round: int) -> None:
        """Acknowledge no roster of a round before ``round``: an order of that round was received."""
        if round > self.seen:
            self.seen = round
            self._write()

    def accept(self, news: Roster | RosterChange) -> bool:
        """Hold the roster ``news``, or the present roster with the change ``news``, from now on. Returns whether it
        did: not if this node holds a roster of that round or of a later round, or a roster that ``news`` does not
        change.
        """
        accepted = self._hold(news)
        if accepted:
            self._write()
        return accepted

    def _hold(self, news: Roster | RosterChange) -> bool:
        held = self.roster
        if held and news.round <= held.round:
            return False
        if isinstance(news, Roster):
            self.roster, self._lines = news, [news.line]
        elif held and news.previous == held.mark:
            self.roster = news.of(held)
            changes = [*self._lines[1:], news.line]
            is_short = sum(map(len, changes)) < len(self._lines[0])
            self._lines = [self._lines[0], *changes] if is_short else [self.roster.line]
        else:
            return False
        self._oldest = 0
        return True

    def forget_bases_before(self, oldest: int) -> None:
        """The leader whose roster this node holds says that no older base than of round ``oldest`` can decide."""
        if self.roster and any(base.round < oldest for base in self.roster.bases):
            bases = tuple(base for base in self.roster.bases if base.round >= oldest)
            self.roster, self._oldest = replace(self.roster, bases=bases), oldest
            self._write()

    def wish(self, wishes: Wishes) -> None:
        """Hold ``wishes``, of the leader that this node obeys, from now on, unless this node holds newer wishes: that
        leader does not know them yet.
        """
        if wishes != self.wishes and wishes.number >= self.wishes.number:
            self.wishes = wishes
            self._write()

    def learn(self, rhythm: Rhythm) -> None:
        """Hold ``rhythm``, unless this node holds a newer one."""
        self.rhythm = self.rhythm.newer(rhythm)

    def _write(self) -> None:
        head = {"votes": self.votes, "seen": self.seen, "oldest": self._oldest, "wishes": self.wishes.body}
        self._keep(b"".join((json_line(head), *self._lines)))
