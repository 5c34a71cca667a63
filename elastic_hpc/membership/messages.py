"""What agents and leader send to each other. Pure.

Both sides always send their *whole* state, on every change and as the heartbeat. So a lost, late, duplicated or
overtaken message does no harm once the next message arrives: ``seq`` shows which messages are old, ``round`` ties every
statement to one formation of the world.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast, get_args

from elastic_hpc.membership.election import Base
from elastic_hpc.membership.hangs import NO_RHYTHM, NO_SIGNS, Rhythm, Signs
from elastic_hpc.membership.known import Party, party_of
from elastic_hpc.membership.nodes import numbers
from elastic_hpc.membership.roster import Host, Hosts, Roster, RosterChange, json_line
from elastic_hpc.membership.slow import NO_PACE, Pace
from elastic_hpc.membership.wishes import NO_WISHES, Bounds, Wishes

MAX_LINE = 1024 * 1024
"""Longest line, in bytes, that either side accepts."""

State = Literal["idle", "running", "succeeded", "failed"]
Stage = Literal["gather", "run", "end"]
Request = Literal["drain", "save-and-stop", "stop"]
"""What a leader can be requested to do: ``drain``, save and requeue the job; ``save-and-stop``, save and end the job;
``stop``, end the job at once.
"""
REQUESTS: tuple[Request, ...] = get_args(Request)
LEAVE = "leave"
"""Requests that the leader releases a node, at a step boundary if its workers listen."""
STAY = "stay"
"""Takes back a ``LEAVE``."""
RESIZE = "resize"
"""Requests other bounds for the world."""
WHO = "who"
"""Asks an agent which leader it follows. The answer, a ``Redirect``, binds neither side."""
_T = TypeVar("_T", "Status", "Failure", "Host", "Roster", "RosterChange", "Leave", "Stay", "Bounds", "Redirect", Base)
_News = TypeVar("_News", "Roster", "RosterChange")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": str,
    "int | str": (int, str),
    "bool": bool,
}


MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError)
"""The errors that decoding a malformed message raises: a field is missing, unknown, or of another type."""


class ProtocolError(Exception):
    """The peer sent a message that is malformed, or could not prove that it holds the secret."""


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
    """When the worker was found dead, in seconds since the epoch on its own node."""
    traceback: str = ""
    """The worker's last Python traceback."""
    collateral: bool = False
    """Whether this looks like the echo of another rank's death, such as a connection closed by the peer."""
    known: str = ""
    """Name of the cause in the table (``known.KNOWN``); empty if the table does not have the cause."""

    @property
    def party(self) -> Party | None:
        """Whose fault the failure is; None if the table of causes does not say."""
        return party_of(self.known)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.message}"


@dataclass(frozen=True)
class Status:
    """What an agent sends to the leader. ``idle`` in round r: the agent knows that r is gathered, and none of its
    workers is alive.
    """

    seq: int
    host: Host
    nproc: int
    state: State = "idle"
    round: int = 0
    failure: Failure | None = None
    seen: int = 0
    """The highest round of all orders that this agent has received."""
    last_order: int = 0
    """``Order.seq`` of the last order that came over this connection."""
    votes: bool = True
    """Whether this agent remembers all that its node has promised (``promises``); else no leader counts it."""
    roster: int = -1
    """Round of the roster that this agent holds."""
    mark: str = ""
    """The ``Roster.mark`` of that roster."""
    step: int = -1
    """Last training step that one of its workers reported; -1 for none."""
    step_at: float = 0.0
    """When ``step`` was reported, in seconds since the epoch on its own node; so is ``first_at``."""
    first: int = -1
    """The first step that the workers reported in this round."""
    first_at: float = 0.0
    loss: float | None = None
    unfit: str = ""
    """Why this node should not take part, as its preflight has found; empty if it may."""
    drained: bool = False
    """The state is ``succeeded`` because the workers stopped for a drain."""
    listens: bool = False
    """The workers check for a drain, or a signal has announced a drain to them."""
    leaving: str = ""
    """Why this node must leave and takes no part in the next round; empty if it may stay."""
    live: bool = False
    """The workers of the round can continue in the next round without a new process (``training.live``); ``idle``:
    workers have paused for that, and hold the trained state.
    """
    preparing: bool = False
    """Workers of this node have yet to be started, or are starting. The world continues without the node until they are
    ready, if that is possible.
    """
    warm: int = 0
    """Number of workers of the round that were standbys; ``cold`` were not, because of ``cold_why``."""
    cold: int = 0
    cold_why: str = ""
    standby_mb: float = 0.0
    """Memory of a standby, in MiB, that it shares with no other process."""
    oldest: int = 0
    """The oldest round of the bases in the roster that this agent holds."""
    kept: int = 0
    """Number of workers of the round that kept their process from the previous round: they are neither warm nor cold.
    """
    not_kept: str = ""
    """Why a worker that could have been kept was not; empty if all were."""
    wishes: Wishes = NO_WISHES
    """The newest wishes that this node has received."""
    signs: Signs = NO_SIGNS
    """Of the workers of the round."""
    pace: Pace = NO_PACE
    """Of the workers of the round."""
    rhythm: Rhythm = NO_RHYTHM
    """The newest rhythm that this node has received."""
    probed: int = 0
    """``Order.probe``, while the leader orders that probe, if this node has tried to reach the others."""
    unreached: str = ""
    """The nodes that it has not reached (``nodes.spans``)."""

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
    """What the leader sends to an agent. ``gather``: stop the workers and acknowledge; ``run``: start the workers as
    ``plan`` says, or wait as a spare without a plan; ``end``: leave the job.
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
    """Whether the leader has a majority."""
    oldest: int = 0
    """The oldest round whose members must agree to the leader (``election``)."""
    drain: bool = False
    """The workers must save and stop."""
    new_world: bool = False
    """The drain is for a new world with nodes of this one: workers that can be kept pause, and need not save."""
    stacks: bool = False
    """Record where the workers stand before they are stopped."""
    live: bool = False
    """Workers of the running round are live (``Status.live``): a node without a place starts its workers ahead."""
    wishes: Wishes = NO_WISHES
    rhythm: Rhythm = NO_RHYTHM
    """What the leader has learned of the job's signs of life."""
    probe: int = 0
    """The nodes of ``among`` must try to reach each other; 0 if no node is (``links``)."""
    among: str = ""
    alone: bool = False
    """``end`` is for this agent alone: the leader has refused the agent, or let it go."""

    @functools.cached_property
    def line(self) -> bytes:
        """An order without a plan is sent to many agents, and encoded once."""
        return json_line(_without_defaults(self) | ({"plan": vars(self.plan)} if self.plan else {}))


@dataclass(frozen=True)
class Leave:
    """To the leader: ``node``, given by number or Slurm's name, must leave, because of ``reason``."""

    node: int | str
    reason: str
    exclude: bool = False
    """As in ``wishes.Parting``; so is ``give_back``. Without both, the node's own job ends: it leaves anyway."""
    give_back: bool = False


@dataclass(frozen=True)
class Stay:
    """To the leader: the node that Slurm calls ``node`` no longer has to leave."""

    node: str


@dataclass(frozen=True)
class Redirect:
    """What an agent answers to ``WHO``. ``to``: the leader that it follows; the agent itself, if it leads or is a
    candidate; None while it looks for a leader. ``leads``: that leader has a majority. A leader also sends a
    ``Redirect`` to an agent that it does not admit at present: ``refusal`` says why.
    """

    to: Host | None
    leads: bool = False
    may_lead: bool = True
    """Whether the agent itself would lead if no other agent did."""
    refusal: str = ""
    answer: str = ""
    """What happens to a request that the leader has accepted, if there is more to say."""


ToLeader = Request | Leave | Stay | Bounds
"""The requests to a leader from outside the agents."""

Message = Status | Order | Roster | RosterChange | Redirect | dict[str, Any]


def encode(message: Message) -> bytes:
    """One line of JSON, without the fields of a status or order that have their default."""
    if isinstance(message, (Order, Roster, RosterChange)):
        return message.line
    if isinstance(message, Status):
        failure = {"failure": vars(message.failure)} if message.failure else {}
        return json_line({**_without_defaults(message), "host": vars(message.host), **failure})
    if isinstance(message, Redirect):
        return json_line({"redirect": {**vars(message), "to": message.to and vars(message.to)}})
    return json_line(message)


def _without_defaults(message: Status | Order) -> dict[str, Any]:
    values = vars(message)
    body = {name: values[name] for name, default in _DEFAULTS[type(message)] if values[name] != default}
    return body | {"wishes": message.wishes.body} if "wishes" in body else body


_DEFAULTS = {kind: [(field.name, field.default) for field in fields(kind)] for kind in (Status, Order)}


def decode(line: bytes) -> dict[str, Any]:
    """The JSON object on ``line``. Raises ProtocolError for anything else."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {line[:60]!r}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"not an object: {line[:60]!r}")
    return body


def decode_from_agent(line: bytes) -> Status | Roster | ToLeader | Literal["who"]:
    """A message to a leader, from an agent or from ``network.client``. Raises ProtocolError."""
    body = decode(line)
    try:
        if body.get("request") in (*REQUESTS, WHO):
            return cast(Request, body["request"])
        if body.get("request") == LEAVE:
            return _checked(Leave(**{name: value for name, value in body.items() if name != "request"}))
        if body.get("request") == STAY:
            return _checked(Stay(body["node"]))
        if body.get("request") == RESIZE:
            return _checked(Bounds.of(body))
        if "roster" in body and "seq" not in body:
            roster = _roster(body["roster"])
            return replace(roster, hosts=tuple(roster.hosts))
        return _status(body)
    except MALFORMED as error:
        raise ProtocolError(f"not a status: {error}") from error


def decode_from_leader(line: bytes) -> Order | Roster | RosterChange | Redirect:
    """A message from a leader, or from an agent that passed as a leader. Raises ProtocolError."""
    body = decode(line)
    try:
        if "roster" in body and "seq" not in body:
            return _with_line(_roster(body["roster"]), line)
        if "change" in body:
            return _with_line(_change(body["change"]), line)
        if "redirect" in body:
            redirect = Redirect(**body["redirect"])
            return _checked(replace(redirect, to=_host(body["redirect"]["to"]) if redirect.to else None))
        plan = body.pop("plan", None)
        return Order(**_with_parts(body), plan=Plan(**plan) if plan else None)
    except MALFORMED as error:
        raise ProtocolError(f"not an order: {error}") from error


def _status(body: dict[str, Any]) -> Status:
    failure = body.pop("failure", None)
    body = {**_with_parts(body), "host": _host(body["host"])}
    status = Status(**body, failure=_checked(Failure(**failure)) if failure else None)
    if status.state not in get_args(State):
        raise TypeError(f"state {status.state!r}: expected one of {', '.join(get_args(State))}")
    return _checked(status)


def _with_parts(body: dict[str, Any]) -> dict[str, Any]:
    return body | {name: of(body[name]) for name, of in _PARTS.items() if name in body}


_PARTS: dict[str, Callable[[Any], object]] = {
    "wishes": Wishes.of,
    "signs": Signs.of,
    "pace": Pace.of,
    "rhythm": Rhythm.of,
}


def _host(body: dict[str, Any]) -> Host:
    return _checked(Host(**{**body, "addresses": tuple(map(str, body["addresses"]))}))


def _roster(body: dict[str, Any]) -> Roster:
    return _checked(Roster(**_of_roster(body)))


def _change(body: dict[str, Any]) -> RosterChange:
    return _checked(RosterChange(**{**_of_roster(body), "gone": numbers(body["gone"])}))


def _with_line(news: _News, line: bytes) -> _News:
    """``news``, with the ``line`` as which it came: the line is stored, and may be forwarded."""
    vars(news)["line"] = line
    return news


def _of_roster(body: dict[str, Any]) -> dict[str, Any]:
    """The hosts stay packed, and so unchecked: the leader is trusted, and its orders are not checked either."""
    bases = (_checked(Base(round, leader, numbers(members))) for round, leader, members in body["bases"])
    barred = tuple(map(str, body["barred"]))
    members = numbers(body["members"])
    return {**body, "hosts": Hosts(body["hosts"]), "bases": tuple(bases), "members": members, "barred": barred}


def _checked(decoded: _T) -> _T:
    """Return ``decoded``. Raises TypeError if a number, string or bool in it has another type than declared."""
    values = vars(decoded)
    for name, kind, expected in _CHECKED[type(decoded)]:
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} {values[name]!r}: expected {expected}")
    return decoded


_CHECKED = {
    kind: [(field.name, _KINDS[str(field.type)], field.type) for field in fields(kind) if str(field.type) in _KINDS]
    for kind in (Status, Failure, Host, Roster, RosterChange, Leave, Stay, Bounds, Redirect, Base)
}
