"""The one place that knows the members: a state machine without sockets, clocks, files or threads.

Inputs are what arrived (``on_...``) and the time; outputs are collected (``take_...``). ``elastic_hpc.server`` connects
it to the network, the tests to a simulated one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from elastic_hpc.decide import Action, Decision, Policy, View, decide
from elastic_hpc.protocol import Failure, Order, Plan, Request, Stage, Status

STOP_TIMEOUT = 60.0
"""Seconds an agent may take to report that its workers are gone, before it is given up: one that cannot be killed."""

Outcome = Literal["finished", "failed", "requeue"]
_OUTCOMES: dict[Action, Outcome] = {Action.FINISH: "finished", Action.FAIL: "failed", Action.REQUEUE: "requeue"}


@dataclass(frozen=True)
class Verdict:
    """How this run of the job ends. Written to the run directory before any agent leaves."""

    outcome: Outcome
    reason: str
    failure: Failure | None
    restarts: int
    requeues: int
    round: int


@dataclass
class _Peer:
    status: Status
    addr: str
    last_heard: float
    joined: bool = False
    """It has been seen without workers; before that it holds nobody up."""


class Leader:
    """Membership and rounds of one job. ``now`` is always the leader's own monotonic clock, in seconds."""

    def __init__(
        self,
        policy: Policy,
        *,
        granted: int,
        nproc: int,
        now: float,
        round: int = 0,
        restarts: int = 0,
        requeues: int = 0,
    ) -> None:
        self.policy = policy
        self.round = round + 1
        self.formed_round = round
        """The last round that was formed, in this run of the job or in one before it."""
        self.restarts = restarts
        self.requeues = requeues
        self.verdict: Verdict | None = None
        self._nproc = nproc
        self._granted = granted
        self._peers: dict[int, _Peer] = {}
        self._refused: dict[int, str] = {}
        self._seen: set[int] = set()
        self._stage: Stage = "gather"
        self._formed: tuple[int, ...] = ()
        self._lost: dict[int, str] = {}
        self._succeeded: set[int] = set()
        self._failure: Failure | None = None
        self._last_failure: Failure | None = None
        self._plans: dict[int, Plan] = {}
        self._stores: dict[int, int] = {}
        self._request: Request | None = None
        self._reason = self._waiting = self._told = "waiting for nodes"
        self._first = True
        self._started = self._gathered = self._below_min = self._ticked = now
        self._min_since: float | None = None
        self._seq = 0
        self._sent: dict[int, tuple[Any, ...]] = {}
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._drop: list[int] = []

    # inputs

    def on_status(self, conn: int, addr: str, status: Status, now: float) -> None:
        """``status`` came over connection ``conn`` from ``addr``."""
        if conn in self._refused or conn in self._drop:
            return
        peer = self._peers.get(conn)
        if peer is None:
            if status.nproc != self._nproc:
                self._refused[conn] = (
                    f"{status.name} would start {status.nproc} workers, the first host {self._nproc}: "
                    "all nodes must start the same number (--nproc-per-node)"
                )
                self._seen.add(status.node)  # it is not waited for
                self._event("refused", node=status.name, reason=self._refused[conn])
                return
            for other, old in list(self._peers.items()):
                if old.status.node == status.node:
                    self.on_lost(other, "a new agent of the same node came", now)
            peer = self._peers[conn] = _Peer(status, addr, now)
        elif status.seq <= peer.status.seq:
            return
        peer.status, peer.last_heard = status, now
        if status.state == "idle" and not peer.joined:
            peer.joined = True
            self._seen.add(status.node)
            self._event("join", node=status.name, addr=addr)
        if self._stage == "run" and status.round == self.round and status.node in self._plans:
            self._on_progress(status)
        self._advance(now)

    def _on_progress(self, status: Status) -> None:
        if status.state == "succeeded":
            self._succeeded.add(status.node)
        elif status.state == "failed" and status.failure:
            self._event("failure", round=self.round, first=self._failure is None, **asdict(status.failure))
            self._failure = self._failure or status.failure

    def on_lost(self, conn: int, reason: str, now: float, *, silent: float = 0.0) -> None:
        """Connection ``conn`` is gone, or must be given up for ``reason``, after ``silent`` seconds of silence."""
        self._sent.pop(conn, None)
        self._refused.pop(conn, None)
        peer = self._peers.pop(conn, None)
        if peer is None:
            return
        self._drop.append(conn)
        if self.verdict or not peer.joined:
            return
        status = peer.status
        self._event("lost", node=status.name, reason=reason, round=self.round, silent=round(silent, 3))
        if status.node in self._plans and status.node not in self._succeeded:
            self._lost[status.node] = f"{status.name} lost: {reason}"
        self._advance(now)

    def on_request(self, request: Request, addr: str, now: float) -> None:
        """Somebody who holds the secret asks to drain or stop the job."""
        self._event("request", request=request, addr=addr)
        if self._request != "stop":
            self._request = request
        self._advance(now)

    def on_store(self, round: int, port: int, now: float) -> None:
        """The store of ``round`` listens on ``port``."""
        self._stores = {r: p for r, p in self._stores.items() if r >= self.round} | {round: port}
        self._advance(now)

    def on_tick(self, now: float) -> None:
        """To be called a few times per heartbeat. A leader that was itself frozen does not blame the others: the time
        it did not look at its connections is not held against them.
        """
        timeout = self.policy.heartbeat_timeout
        stalled = now - self._ticked - timeout / 4
        self._ticked = now
        if stalled > 0:
            for peer in self._peers.values():
                peer.last_heard = min(now, peer.last_heard + stalled)
        for conn, peer in list(self._peers.items()):
            if now - peer.last_heard > timeout:
                self.on_lost(conn, f"nothing heard for {timeout:g} s", now, silent=now - peer.last_heard)
            elif (
                self._stage == "gather"
                and peer.joined
                and not self._is_ready(peer.status)
                and now - self._gathered > STOP_TIMEOUT
            ):
                self.on_lost(conn, f"its workers did not stop within {STOP_TIMEOUT:g} s", now)
        self._advance(now)
        if self._stage == "gather" and self._waiting != self._told and now - self._gathered > 1 and not self.verdict:
            self._told = self._waiting
            self._event("waiting", round=self.round, reason=self._waiting)

    def on_saved(self) -> None:
        """The verdict is on disk (or cannot be written): the agents may leave."""
        self._stage = "end"

    # outputs

    def take_orders(self, *, beat: bool = False) -> dict[int, Order]:
        """Orders to send, by connection: the ones that changed, or with ``beat`` one for everybody."""
        orders: dict[int, Order] = {}
        for conn, refusal in self._refused.items():
            if self._sent.get(conn) != (refusal,):
                self._sent[conn] = (refusal,)
                orders[conn] = self._order("end", refusal, outcome="failed")
        for conn, peer in self._peers.items():
            plan = self._plans.get(peer.status.node) if self._stage == "run" else None
            content = (self._stage, self.round, plan)
            if beat or self._sent.get(conn) != content:
                self._sent[conn] = content
                outcome = self.verdict.outcome if self.verdict and self._stage == "end" else None
                orders[conn] = self._order(self._stage, self._reason, plan, outcome)
        return orders

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """What happened since the last call, for the record: ``(name, fields)``."""
        events, self._events = self._events, []
        return events

    def take_dropped(self) -> list[int]:
        """Connections that are to be closed."""
        dropped, self._drop = self._drop, []
        return dropped

    @property
    def next_expiry(self) -> float:
        """When, on the leader's clock, the next agent is taken for lost unless it is heard before."""
        heard = (peer.last_heard for peer in self._peers.values())
        return min(heard, default=float("inf")) + self.policy.heartbeat_timeout

    @property
    def wanted_store(self) -> int | None:
        """The round whose store should be opened next. One is always opened ahead of its need."""
        wanted = self.round + (self._stage == "run")
        return wanted if wanted not in self._stores and not self.verdict else None

    # inside

    def _order(self, stage: Stage, reason: str, plan: Plan | None = None, outcome: Outcome | None = None) -> Order:
        self._seq += 1
        return Order(self._seq, stage, self.round, reason, plan, outcome)

    def _is_ready(self, status: Status) -> bool:
        return status.state == "idle" and (self._stage == "run" or status.round == self.round)

    def _view(self, now: float) -> View:
        live = {peer.status.node for peer in self._peers.values() if peer.joined}
        enough = len(live) >= self.policy.min_nodes
        if enough:
            self._min_since = now if self._min_since is None else self._min_since
            self._below_min = now
        else:
            self._min_since = None
        first_loss = next(iter(self._lost.values()), None)
        return View(
            formed=frozenset(self._formed) - self._lost.keys(),
            lost=frozenset(self._lost),
            succeeded=frozenset(self._succeeded),
            failure=str(self._failure) if self._failure else first_loss,
            ready=frozenset(p.status.node for p in self._peers.values() if self._is_ready(p.status)),
            live=frozenset(live),
            absent=max(0, self._granted - len(self._seen)),
            first=self._first,
            since_start=now - self._started,
            since_min=now - self._min_since if self._min_since is not None else 0.0,
            below_min=now - self._below_min,
            store_ready=self.round in self._stores,
            restarts=self.restarts,
            requeues=self.requeues,
            request=self._request,
        )

    def _advance(self, now: float) -> None:
        while not self.verdict:
            view = self._view(now)
            decision = decide(view, self.policy)
            if decision.action is Action.WAIT:
                self._waiting = decision.reason
                return
            self._act(decision, now)

    def _act(self, decision: Decision, now: float) -> None:
        self._reason = decision.reason
        self._last_failure = self._failure or self._last_failure
        if decision.action is Action.FORM:
            self._form(decision)
        elif decision.action is Action.GATHER:
            self._clear_round(now)
            self.restarts += decision.charged
            self._event("restart", round=self.round, restarts=self.restarts, reason=decision.reason)
        else:
            self._end(decision, now)

    def _form(self, decision: Decision) -> None:
        addresses = {peer.status.node: peer.addr for peer in self._peers.values()}
        names = {peer.status.node: peer.status.name for peer in self._peers.values()}
        self._stage, self._first, self._formed = "run", False, decision.nodes
        self.formed_round = self.round
        self._plans = {
            node: Plan(
                group_rank, len(decision.nodes), self.restarts, self._stores[self.round], addresses[decision.nodes[0]]
            )
            for group_rank, node in enumerate(decision.nodes)
        }
        self._event(
            "round",
            round=self.round,
            nodes=[names[node] for node in decision.nodes],
            world_size=len(decision.nodes) * self._nproc,
            restarts=self.restarts,
        )

    def _clear_round(self, now: float) -> None:
        self.round += 1
        self._stage, self._formed, self._plans, self._gathered = "gather", (), {}, now
        self._lost, self._succeeded, self._failure = {}, set(), None

    def _end(self, decision: Decision, now: float) -> None:
        outcome = _OUTCOMES[decision.action]
        ended = self.round
        if outcome == "requeue":
            self.requeues += decision.charged
        if outcome != "finished":
            self._clear_round(now)
        self.verdict = Verdict(
            outcome,
            decision.reason,
            None if outcome == "finished" else self._last_failure,
            self.restarts,
            self.requeues,
            ended,
        )
        self._event("verdict", **asdict(self.verdict))

    def _event(self, name: str, **fields: Any) -> None:
        self._events.append((name, fields))
