"""What a node has promised to the leaders that its agent obeyed. Pure.

As Raft's persisted vote, a promise outlives the agent that made the promise: an agent stores a promise before it sends
any message that depends on the promise, and an agent that is started anew on the node begins with the stored promises.
``agent.promise_file`` stores the promises in a file of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from elastic_hpc.membership.messages import ProtocolError, decode, decode_from_leader
from elastic_hpc.membership.roster import Roster, json_line


class Promises:
    """The promises of one node, which its agent and the leader on it share. ``election`` says what they are for."""

    def __init__(
        self, keep: Callable[[bytes], None] = lambda _: None, kept: bytes = b"", *, votes: bool = True
    ) -> None:
        """``keep`` stores what the next agent of this node is given as ``kept``. Without ``votes`` this node trains
        like any other, but no leader counts its agreement. Raises ProtocolError if ``kept`` is damaged.
        """
        self._keep = keep
        self.votes = votes
        self.seen = 0
        """The highest round of all orders that this node has received. Of earlier rounds it acknowledges no roster."""
        self.roster: Roster | None = None
        """The newest roster that this node has received, or has sent as the leader."""
        self._whole: Roster | None = None
        """That roster with all its bases. It is encoded once, however often promises are stored."""
        self._oldest = 0
        """No base of an earlier round than this can decide."""
        if kept:
            first, *rest = kept.splitlines()
            before, roster = decode(first), decode_from_leader(rest[0]) if rest else None
            numbers = before.get("seen"), before.get("oldest")
            if not (all(type(number) is int for number in numbers) and (roster is None or isinstance(roster, Roster))):
                raise ProtocolError(f"not what a node has promised: {kept[:60]!r}")
            self.votes, self.seen = votes and bool(before.get("votes")), before["seen"]
            self.roster = self._whole = roster
            self.forget_bases_before(before["oldest"])
        self._write()

    def promise(self, round: int) -> None:
        """Acknowledge no roster of a round before ``round``: an order of that round was received."""
        if round > self.seen:
            self.seen = round
            self._write()

    def accept(self, roster: Roster) -> bool:
        """Hold ``roster`` from now on, unless this node holds a roster of that round or of a later round. Whether the
        roster was accepted.
        """
        if self.roster and roster.round <= self.roster.round:
            return False
        self.roster = self._whole = roster
        self._oldest = 0
        self._write()
        return True

    def forget_bases_before(self, oldest: int) -> None:
        """The leader whose roster this node holds says that no older base than of round ``oldest`` can decide."""
        if self.roster and any(base.round < oldest for base in self.roster.bases):
            bases = tuple(base for base in self.roster.bases if base.round >= oldest)
            self.roster, self._oldest = replace(self.roster, bases=bases), oldest
            self._write()

    def _write(self) -> None:
        numbers = json_line({"votes": self.votes, "seen": self.seen, "oldest": self._oldest})
        self._keep(numbers + (self._whole.line if self._whole else b""))
