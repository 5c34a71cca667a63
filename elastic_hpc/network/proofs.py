"""How the two ends of a connection prove to each other that they hold the job's secret, without sending it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Literal

from elastic_hpc.membership.messages import ProtocolError

Role = Literal["agent", "leader"]


def new_nonce() -> str:
    return secrets.token_hex(16)


def proof(secret: bytes, role: Role, theirs: str, ours: str) -> str:
    """Answer to the challenge ``theirs``; ``ours`` is the challenge sent along. The role keeps one side's proof from
    being played back to it as the other side's.
    """
    return hmac.new(secret, f"{role}:{theirs}:{ours}".encode(), hashlib.sha256).hexdigest()


def check_proof(secret: bytes, role: Role, theirs: str, ours: str, given: object) -> None:
    """Raise ProtocolError unless ``given`` is ``proof(...)`` of the same arguments."""
    expected = proof(secret, role, theirs, ours)
    if not isinstance(given, str) or not hmac.compare_digest(expected.encode(), given.encode()):
        raise ProtocolError(f"the peer does not hold this job's secret (it claimed to be the {role})")
