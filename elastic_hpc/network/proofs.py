"""The MACs of a connection: each end proves once who it is, and then each line proves that it is the next one.

The handshake is three lines. The acceptor sends a nonce; the dialer a nonce and its identity; the acceptor its
identity. The last two lines have a MAC under the job's secret over all bytes sent until then, and over the role of the
sender. So no process without the secret can pose as an agent of this job, and the lines of one connection are of no use
on another. From the three lines and the secret both ends make two keys, one for each direction. Every later line has a
MAC under its direction's key over its number and its text. So a relay that forwards the handshake can close the
connection and delay lines, but it cannot add, repeat, reorder, alter or leave out lines.

Not protected: nothing is encrypted; any process that holds the job's secret can take part as any node; and a relay can
keep the last lines of a connection from arriving, as a cut cable does.

The MACs are HMAC-SHA256, as BLAKE2 is missing where FIPS 140 is enforced.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from functools import lru_cache
from typing import Literal

from elastic_hpc.membership.messages import ProtocolError

Role = Literal["dialer", "acceptor"]

MAC_SIZE = 32
"""Length of a MAC at the head of a line, in hexadecimal digits."""


def new_nonce() -> str:
    return secrets.token_hex(16)


class Seal:
    """The MACs of the lines of one direction."""

    def __init__(self, key: bytes) -> None:
        self._key = hmac.new(key, digestmod="sha256")
        self._count = 0

    def sign(self, line: bytes) -> bytes:
        """The MAC of ``line``, which is the next line that is sent."""
        return self._next(_digest(line))

    def check(self, signed: bytes) -> bytes:
        """The line in ``signed``, which was received next. Raises ProtocolError if its MAC is wrong."""
        line = signed[MAC_SIZE:]
        if not hmac.compare_digest(signed[:MAC_SIZE], self._next(hashlib.sha256(line).digest())):
            raise ProtocolError("a line does not come from the peer of the handshake, or lines are missing before it")
        return line

    def _next(self, digest: bytes) -> bytes:
        self._count += 1
        mac = self._key.copy()
        mac.update(b"%d:%b" % (self._count, digest))
        return mac.hexdigest()[:MAC_SIZE].encode()


@lru_cache(maxsize=4)
def _digest(line: bytes) -> bytes:
    """An order or a roster is sent to a thousand agents: only the first MAC needs a pass over the line."""
    return hashlib.sha256(line).digest()


class Handshake:
    """The lines of a connection until both ends have proved who they are."""

    def __init__(self, secret: bytes, challenge: bytes) -> None:
        """``challenge``: the first line."""
        self._transcript = hmac.new(secret, challenge, "sha256")

    def sign(self, role: Role, line: bytes) -> bytes:
        """``line``, which ``role`` sends next, with its MAC."""
        self._transcript.update(line)
        return self._mac(role).hexdigest()[:MAC_SIZE].encode() + line

    def check(self, role: Role, signed: bytes) -> bytes:
        """The line in ``signed``, of ``role``. Raises ProtocolError if ``role`` does not hold the secret."""
        line = signed[MAC_SIZE:]
        if not hmac.compare_digest(signed, self.sign(role, line)):
            raise ProtocolError(f"the peer does not hold this job's secret (it claimed to be the {role})")
        return line

    def seal(self, role: Role) -> Seal:
        """The seal for the lines that ``role`` sends after the handshake."""
        return Seal(self._mac(f"key of the {role}").digest())

    def _mac(self, purpose: str) -> hmac.HMAC:
        mac = self._transcript.copy()
        mac.update(purpose.encode())
        return mac
