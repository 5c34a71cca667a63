"""What agents and leader say to each other, and how they prove who they are. Pure.

Both sides always send their *whole* state, on every change and as the heartbeat. A message that is lost, late,
doubled or overtaken is therefore healed by the next one: ``seq`` drops what is old, ``round`` ties every statement
to one formation of the world.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

MAX_LINE = 256 * 1024
"""Longest line, in bytes, that either side accepts."""

State = Literal["idle", "running", "succeeded", "failed"]
Stage = Literal["gather", "run", "end"]
Request = Literal["drain", "stop"]
"""What may be asked of the leader: ``drain``, the warning signal came; ``stop``, the user wants the job to end."""


class ProtocolError(Exception):
    """The peer said something that this protocol does not know, or could not prove that it holds the secret."""


@dataclass(frozen=True)
class Failure:
    """Why an agent's workers stopped: the first failing rank of that agent."""

    kind: str
    """``exception`` (torch's error file tells which), ``signal`` or ``exit``."""
    node: str
    rank: int
    local_rank: int
    exitcode: int
    message: str
    time: float
    """When the worker was seen dead, seconds since the epoch on its own node."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.message}"


@dataclass(frozen=True)
class Status:
    """Agent to leader. ``idle`` in round r means: told to gather for r, and none of its workers is alive."""

    seq: int
    node: int
    name: str
    nproc: int
    state: State = "idle"
    round: int = 0
    failure: Failure | None = None


@dataclass(frozen=True)
class Plan:
    """One node's place in a round."""

    group_rank: int
    group_world_size: int
    restart_count: int
    store_port: int
    rank0_addr: str


@dataclass(frozen=True)
class Order:
    """Leader to agent. ``gather``: stop your workers and say so; ``run``: start them (``plan``), or wait as a spare
    (no plan); ``end``: leave.
    """

    seq: int
    stage: Stage
    round: int
    reason: str
    plan: Plan | None = None
    outcome: Literal["finished", "failed", "requeue"] | None = None


def encode(message: Status | Order | dict[str, Any]) -> bytes:
    """One JSON line."""
    body = message if isinstance(message, dict) else asdict(message)
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The JSON object on ``line``. Raises ProtocolError for anything else."""
    try:
        body = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {line[:60]!r}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"not an object: {line[:60]!r}")
    return body


def decode_status(line: bytes) -> Status | Request:
    body = decode(line)
    if body.get("request") in {"drain", "stop"}:
        return cast(Request, body["request"])
    try:
        failure = body.pop("failure", None)
        return Status(**body, failure=Failure(**failure) if failure else None)
    except TypeError as error:
        raise ProtocolError(f"not a status: {error}") from error


def decode_order(line: bytes) -> Order:
    body = decode(line)
    try:
        plan = body.pop("plan", None)
        return Order(**body, plan=Plan(**plan) if plan else None)
    except TypeError as error:
        raise ProtocolError(f"not an order: {error}") from error


def new_nonce() -> str:
    return secrets.token_hex(16)


def proof(secret: bytes, role: Literal["agent", "leader"], theirs: str, ours: str) -> str:
    """Answer to the challenge ``theirs``; ``ours`` is the challenge sent along. The role keeps one side's proof from
    being played back to it as the other side's.
    """
    return hmac.new(secret, f"{role}:{theirs}:{ours}".encode(), hashlib.sha256).hexdigest()


def check_proof(secret: bytes, role: Literal["agent", "leader"], theirs: str, ours: str, given: object) -> None:
    """Raise ProtocolError unless ``given`` is ``proof(...)`` of the same arguments."""
    if not isinstance(given, str) or not hmac.compare_digest(
        proof(secret, role, theirs, ours).encode(), given.encode()
    ):
        raise ProtocolError(f"the peer does not hold this job's secret (it claimed to be the {role})")
