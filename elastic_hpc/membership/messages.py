"""What agents and leader say to each other. Pure.

Both sides always send their *whole* state, on every change and as the heartbeat. A message that is lost, late,
doubled or overtaken is therefore healed by the next one: ``seq`` drops what is old, ``round`` ties every statement
to one formation of the world.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast, get_args

from elastic_hpc.membership.election import Base
from elastic_hpc.membership.nodes import numbers
from elastic_hpc.membership.roster import Host, Hosts, Roster, RosterChange, json_line

MAX_LINE = 1024 * 1024
"""Longest line, in bytes, that either side accepts."""

State = Literal["idle", "running", "succeeded", "failed"]
Stage = Literal["gather", "run", "end"]
Request = Literal["drain", "save-and-stop", "stop"]
"""What may be asked of the leader: ``drain``, save and return through the queue; ``save-and-stop``, save and end the
job; ``stop``, end it at once.
"""
REQUESTS: tuple[Request, ...] = get_args(Request)
LEAVE = "leave"
"""Asks the leader to let one node go, at a step boundary if its workers listen; a joiner's job is about to end."""
WHO = "who"
"""Asks an agent, leader or not, whom it follows. Answered by a ``Redirect``; commits to nothing."""
_T = TypeVar("_T", "Status", "Failure", "Host", "Roster", "RosterChange", "Leave", Base)
_KINDS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": str,
    "bool": bool,
}


_NONSENSE = (TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a message that is none leads to."""


class ProtocolError(Exception):
    """The peer said something that this protocol does not know, or could not prove that it holds the secret."""


@dataclass(frozen=True)
class Failure:
    """Why an agent's workers stopped: the first failing rank of that agent."""

    kind: str
    """``exception``, ``out of memory``, ``signal``, ``exit``, ``hang`` or ``stopped``."""
    node: str
    rank: int
    local_rank: int
    exitcode: int
    message: str
    time: float
    """When the worker was seen dead, seconds since the epoch on its own node."""
    traceback: str = ""
    """The worker's last Python traceback."""
    collateral: bool = False
    """Whether this looks like the echo of another rank's death, such as a connection closed by the peer."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.message}"


@dataclass(frozen=True)
class Status:
    """Agent to leader. ``idle`` in round r means: told to gather for r, and none of its workers is alive."""

    seq: int
    host: Host
    nproc: int
    state: State = "idle"
    round: int = 0
    failure: Failure | None = None
    seen: int = 0
    """Highest round that this agent was ever told of."""
    roster: int = -1
    """Round of the roster that this agent holds."""
    mark: str = ""
    """Which one of that round."""
    step: int = -1
    """Last training step that one of its workers reported; -1 for none."""
    step_at: float = 0.0
    """When, in seconds since the epoch on its own node; so is ``first_at``."""
    first: int = -1
    """The first step that they have reported in this round."""
    first_at: float = 0.0
    loss: float | None = None
    unfit: str = ""
    """Why this node should not take part, as its preflight found."""
    drained: bool = False
    """``succeeded``, because the workers stopped for a drain."""
    listens: bool = False
    """Its workers ask whether they are to save and stop, or were told so by a signal."""
    leaving: str = ""
    """Why this node has to go: it takes no part in the next round."""
    warm: int = 0
    """So many workers of the round had been standbys; ``cold`` were not, because of ``cold_why``."""
    cold: int = 0
    cold_why: str = ""
    standby_mb: float = 0.0
    """Memory of one standby, in MiB, as far as it shares it with nobody."""

    @property
    def node(self) -> int:
        return self.host.node

    @property
    def name(self) -> str:
        return self.host.name


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
    roster: int = -1
    """Round of the roster that the leader holds."""
    leads: bool = True
    """False while it has no majority yet, or any more."""
    oldest: int = 0
    """Members of rounds before this one are not asked any more (``elastic_hpc.membership.election``)."""
    drain: bool = False
    """The workers shall save and stop."""
    stacks: bool = False
    """Record where the workers stand before they are stopped."""

    @functools.cached_property
    def line(self) -> bytes:
        """One without a plan goes to many, and is encoded once."""
        return json_line(_told(self) | ({"plan": vars(self.plan)} if self.plan else {}))


@dataclass(frozen=True)
class Leave:
    """To the leader: ``node`` has to go, because of ``reason``."""

    node: int
    reason: str


@dataclass(frozen=True)
class Redirect:
    """Agent to agent: whom I follow, myself if I lead or want to, None if I look for a leader. ``leads``: it has a
    majority.
    """

    to: Host | None
    leads: bool = False


Message = Status | Order | Roster | RosterChange | Redirect | dict[str, Any]


def encode(message: Message) -> bytes:
    """One JSON line, without what has its default. A roster, its change and a redirect are marked as what they are."""
    if isinstance(message, (Order, Roster, RosterChange)):
        return message.line
    if isinstance(message, Status):
        failure = {"failure": vars(message.failure)} if message.failure else {}
        return json_line({**_told(message), "host": vars(message.host), **failure})
    if isinstance(message, Redirect):
        return json_line({"redirect": {"to": message.to and vars(message.to), "leads": message.leads}})
    return json_line(message)


def _told(said: Status | Order) -> dict[str, Any]:
    values = vars(said)
    return {name: values[name] for name, default in _DEFAULTS[type(said)] if values[name] != default}


_DEFAULTS = {said: [(one.name, one.default) for one in fields(said)] for said in (Status, Order)}


def decode(line: bytes) -> dict[str, Any]:
    """The JSON object on ``line``. Raises ProtocolError for anything else."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {line[:60]!r}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"not an object: {line[:60]!r}")
    return body


def decode_from_agent(line: bytes) -> Status | Roster | Leave | Request | Literal["who"]:
    """What an agent, or somebody who asks for something, says to a leader. Raises ProtocolError."""
    body = decode(line)
    try:
        if body.get("request") in (*REQUESTS, WHO):
            return cast(Request, body["request"])
        if body.get("request") == LEAVE:
            return _checked(Leave(body["node"], body["reason"]))
        if "roster" in body and "seq" not in body:
            roster = _roster(body["roster"])
            return replace(roster, hosts=tuple(roster.hosts))
        return _status(body)
    except _NONSENSE as error:
        raise ProtocolError(f"not a status: {error}") from error


def decode_from_leader(line: bytes) -> Order | Roster | RosterChange | Redirect:
    """What a leader, or an agent that was taken for one, says. Raises ProtocolError."""
    body = decode(line)
    try:
        if "roster" in body and "seq" not in body:
            return _roster(body["roster"])
        if "change" in body:
            return _change(body["change"])
        if "redirect" in body:
            to = body["redirect"]["to"]
            return Redirect(_host(to) if to else None, bool(body["redirect"]["leads"]))
        plan = body.pop("plan", None)
        return Order(**body, plan=Plan(**plan) if plan else None)
    except _NONSENSE as error:
        raise ProtocolError(f"not an order: {error}") from error


def _status(body: dict[str, Any]) -> Status:
    failure = body.pop("failure", None)
    status = Status(**{**body, "host": _host(body["host"])}, failure=_checked(Failure(**failure)) if failure else None)
    if status.state not in get_args(State):
        raise TypeError(f"state {status.state!r}: expected one of {', '.join(get_args(State))}")
    return _checked(status)


def _host(body: dict[str, Any]) -> Host:
    return _checked(Host(**{**body, "addresses": tuple(map(str, body["addresses"]))}))


def _roster(body: dict[str, Any]) -> Roster:
    return _checked(Roster(**_of_roster(body)))


def _change(body: dict[str, Any]) -> RosterChange:
    return _checked(RosterChange(**{**_of_roster(body), "gone": numbers(body["gone"])}))


def _of_roster(body: dict[str, Any]) -> dict[str, Any]:
    """The leader's hosts are not looked at before they are needed, as its orders are not checked either."""
    bases = (_checked(Base(round, leader, numbers(members))) for round, leader, members in body["bases"])
    return {**body, "hosts": Hosts(body["hosts"]), "bases": tuple(bases), "members": numbers(body["members"])}


def _checked(said: _T) -> _T:
    """``said``, a dataclass, if its numbers are numbers and its strings are strings. Raises TypeError."""
    values = vars(said)
    for name, kind, expected in _CHECKED[type(said)]:
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} {values[name]!r}: expected {expected}")
    return said


_CHECKED = {
    said: [(one.name, _KINDS[str(one.type)], one.type) for one in fields(said) if str(one.type) in _KINDS]
    for said in (Status, Failure, Host, Roster, RosterChange, Leave, Base)
}
