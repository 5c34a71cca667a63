"""The one place that knows the members: a state machine without sockets, clocks, files or threads.

Inputs are what arrived (``on_...``) and the time; outputs are collected (``take_...``). ``network.server`` connects it
to the network, the tests to a simulated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from elastic_hpc.membership.election import Base
from elastic_hpc.membership.growth import Coming, Needs
from elastic_hpc.membership.mandate import Mandate
from elastic_hpc.membership.messages import Failure, Order, Plan, Request, Stage, Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.orders import Orders, Sent
from elastic_hpc.membership.peers import Peer, Peers, weighed
from elastic_hpc.membership.policy import Action, Decision, Policy, View
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.rules import decide, requeue_or_fail
from elastic_hpc.membership.world import SETTLE, Progress, World

STOP_TIMEOUT = 60.0
"""Seconds an agent may take to report that its workers are gone, before it is given up: one that cannot be killed."""

Outcome = Literal["finished", "failed", "requeue"]
_OUTCOMES: dict[Action, Outcome] = {Action.FINISH: "finished", Action.FAIL: "failed", Action.REQUEUE: "requeue"}


@dataclass(frozen=True)
class Verdict:
    """How this run of the job ends. Written to the run directory before any agent leaves."""

    outcome: Outcome
    cause: str
    reason: str
    failure: Failure | None
    restarts: int
    requeues: int
    round: int


class Leader:
    """Membership and rounds of one job. ``now`` is always the leader's own monotonic clock, in seconds.

    What agents say is only noted, ``decide`` acts on it: of a thousand that say the same at once, none costs a look at
    all the others, nor does a heartbeat without news.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        node: int,
        nproc: int,
        now: float,
        granted: int = 0,
        granted_names: Sequence[str] = (),
        round: int = 0,
        restarts: int = 0,
        requeues: int = 0,
        inherited: Roster | None = None,
        reason: str = "",
        supplied: bool = False,
        host: Host | None = None,
    ) -> None:
        """Lead from the start, with the counters of the run before; or take over what ``inherited`` says, because of
        ``reason``, as soon as a majority agrees. ``supplied``: somebody answers to ``needs``.
        ``granted_names``: Slurm's names of the granted nodes, in its order; it may be filled later.
        ``host``: its own, whose software the others must have.
        """
        self.policy = policy
        roster = inherited or Roster(round, (), (), restarts, requeues)
        self._mandate = Mandate(roster, inherited=inherited is not None, now=now)
        self.round = roster.round + 1
        self.restarts = roster.restarts
        self.requeues = roster.requeues
        self.abdicated = ""
        """Why it stopped to lead without a verdict: the loss that cost it its majority, where one is known."""
        self.verdict: Verdict | None = None
        self._node = node
        self._nproc = nproc
        self._host = host
        self._granted = granted
        self._granted_names = granted_names
        self._inherited = reason if inherited else ""
        self._peers = Peers(roster.hosts, policy.heartbeat_timeout, now)
        self._orders = Orders()
        self._coming = Coming(supplied)
        self._grown = -float("inf")
        self._highest = 0  # round that any agent was told of, by whichever leader
        self._stage: Stage = "gather"
        self._world = World()
        self._progress = Progress()
        self._stores: dict[int, int] = {}
        self._store_error = ""
        self._request: Request | None = None
        self._requested_for = ""
        self._reason = self._waiting = self._told = reason or "waiting for nodes"
        self._first = inherited is None
        self._news = True
        self._again = float("inf")
        self._started = self._gathered = self._below_min = self._had_store = now
        self._requested = now
        self._min_since: float | None = None
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._drop: list[int] = []
        self._last_loss = ""
        """Since the last round was formed."""

    # inputs

    def on_status(self, conn: int, addr: str, status: Status, now: float) -> None:
        """``status`` came over connection ``conn`` from ``addr``."""
        if conn in self._orders.refused or conn in self._drop:
            return
        peer = self._peers.get(conn)
        if peer is None:
            if refusal := self._peers.refusal(status, self._nproc, self._host):
                self._refuse(conn, status, refusal)
                if status.node == self._node and self._first:
                    self._end(requeue_or_fail(refusal, self.requeues, self.policy), now)
                return
            old = self._peers.conns.get(status.node)
            if old is not None:
                self.on_lost(old, "a new agent of the same node came")
                self.decide(now)
            forgetful = status.roster < 0 and self._mandate.is_member(status.node)
            peer = Peer(status, addr, now, since=now, forgetful=forgetful)
            self._peers.add(conn, peer)
            news = True
            if self._stage == "gather" and status.seen >= self.round:
                # another leader may have formed that round from those who were with it
                self.round, self._gathered = status.seen + 1, now
        elif status.seq <= peer.status.seq or status.node != peer.status.node:
            return
        else:
            news = weighed(status) != weighed(peer.status)
        self._news = self._news or news
        self._peers.hear(peer, status, now)
        self._highest = max(self._highest, status.seen)
        self._mandate.on_status(status)
        if not peer.joined and (status.state == "idle" or self._was_member(status.node)):
            peer.joined, peer.since = True, now
            self._peers.saw(status.node)
            self._event("join", node=status.name, addr=addr, joiner=not votes(status.node))
            self._coming.doubt()
        if self._stage == "run" and status.node in self._world.plans:
            if status.round == self.round:
                self._on_progress(status)
                if news:
                    self._on_state(status, now)
            elif status.state == "idle":
                self._world.lost.setdefault(status.node, f"{status.name} lost: it has left the round")

    def on_roster(self, roster: Roster) -> None:
        """An agent knows of a later round than the one that was inherited."""
        if not self.leads and self._stage == "gather" and self._mandate.on_roster(roster):
            self.restarts, self.requeues = max(self.restarts, roster.restarts), roster.requeues
            self.round = max(self.round, roster.round + 1)
            self._news = True

    def on_lost(self, conn: int, reason: str, *, silent: float = 0.0) -> None:
        """Connection ``conn`` is gone, or must be given up for ``reason``, after ``silent`` seconds of silence."""
        self._orders.forget(conn)
        peer = self._peers.remove(conn)
        if peer is None:
            return
        self._drop.append(conn)
        if self.verdict or self.abdicated or not peer.joined:
            return
        status = peer.status
        why = self._peers.why_leaving(status)
        name, reason = ("left", why) if why else ("lost", reason)
        self._event(name, node=status.name, reason=reason, round=self.round, silent=round(silent, 3))
        self._coming.doubt()
        self._last_loss = f"{status.name} lost: {reason}"
        if status.node in self._world.plans and status.node not in self._world.succeeded:
            self._world.lost[status.node] = self._last_loss
        self._news = True

    def decide(self, now: float) -> None:
        """Act on what agents have said, or that they are lost: to be called when all that has arrived is in."""
        if self._news:
            self._advance(now)

    def on_request(self, request: Request, reason: str, now: float) -> None:
        """Somebody who holds the secret asks to drain or stop the job, because of ``reason``: ``time limit``,
        ``preempted`` or ``user``; a worker that wants the end says why in its own words.
        """
        self._event("request", request=request, reason=reason)
        if self._request is None:
            self._requested = now
        if self._request is None or request == "stop":
            self._requested_for = reason
        if self._request is None or request == "stop" or (request, self._request) == ("save-and-stop", "drain"):
            self._request = request
        self._advance(now)

    def on_leave(self, node: int, reason: str, now: float) -> None:
        """``node`` has to go, because of ``reason``: its job is about to end."""
        self._peers.leaving.setdefault(node, reason)
        self._advance(now)

    def on_coming(self, needs: Needs, starting: int, pending: int, now: float) -> None:
        """What is on its way, in answer to ``needs``: agents that are starting, and nodes that Slurm was asked for."""
        self._coming.told(starting, pending, sure=needs == self.needs)
        self._advance(now)

    def on_store(self, round: int, port: int, now: float) -> None:
        """The store of ``round`` listens on ``port``."""
        self._stores = {r: p for r, p in self._stores.items() if r >= self.round} | {round: port}
        self._store_error = ""
        self._advance(now)

    def on_store_failed(self, round: int, reason: str, now: float) -> None:
        """The store of ``round`` could not be opened, because of ``reason``; it is tried again."""
        if reason != self._store_error:
            self._store_error = reason
            self._event("store_failed", round=round, reason=reason)
        self._advance(now)

    def on_tick(self, now: float) -> None:
        """To be called a few times per heartbeat."""
        for conn, silent in self._peers.silent(now).items():
            self.on_lost(conn, f"nothing heard for {self.policy.heartbeat_timeout:g} s", silent=silent)
        if self._stage == "gather" and now - self._gathered > STOP_TIMEOUT:
            for conn, peer in list(self._peers.items()):
                if peer.joined and not self._is_ready(peer.status):
                    self.on_lost(conn, f"its workers did not stop within {STOP_TIMEOUT:g} s")
        self._advance(now)
        self._tell_progress(now)
        if self._stage == "gather" and now - self._gathered > 1 and not self.verdict:
            missing = self._peers.not_joined(self._granted_names) if self._first else ""
            waiting = self._waiting + (f"; not joined yet: {missing}" if missing else "")
            if waiting != self._told:
                self._told = waiting
                self._event("waiting", round=self.round, reason=waiting)

    def on_saved(self) -> None:
        """The verdict is on disk, or cannot be written: the agents may leave."""
        self._stage = "end"

    # outputs

    @property
    def leads(self) -> bool:
        """Whether enough nodes agree: only then it decides."""
        return self._mandate.granted

    @property
    def has_led(self) -> bool:
        return self._mandate.ever_granted

    @property
    def roster(self) -> Roster:
        """What the agents hold since the last round was formed."""
        return self._mandate.roster

    def take_orders(self, *, beat: bool = False) -> dict[int, list[Sent]]:
        """What to send, by connection: the orders that changed, or with ``beat`` one for everybody; before them the
        roster to those who do not have it.
        """
        runs, failure = self._stage == "run", self._progress.last_failure
        order = Order(
            seq=0,
            stage=self._stage,
            round=self.round,
            reason=self._reason,
            outcome=self.verdict.outcome if self.verdict and self._stage == "end" else None,
            roster=self.roster.round,
            leads=self.leads,
            oldest=self._mandate.oldest,
            drain=runs and bool(self._request in {"drain", "save-and-stop"} or self._world.change),
            stacks=bool(self._stage == "gather" and failure and failure.kind == "hang"),
        )
        plans = self._world.plans if runs and self._is_settled else {}
        return self._orders.take(self._peers, order, plans, self.roster, self._mandate.change, beat=beat)

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """What happened since the last call, for the record: ``(name, fields)``."""
        events, self._events = self._events, []
        return events

    def take_dropped(self) -> list[int]:
        """Connections that are to be closed."""
        dropped, self._drop = self._drop, []
        return dropped

    @property
    def nodes(self) -> set[int]:
        """Nodes whose agents are in touch."""
        return set(self._peers.by_node)

    @property
    def lost_names(self) -> list[str]:
        """Slurm's names of the nodes that were here, and are not any more."""
        return self._peers.lost_names

    @property
    def other_names(self) -> list[str]:
        """Slurm's names of the job's own nodes that are here besides this one."""
        return self._peers.names(but=self._node)

    @property
    def needs(self) -> Needs | None:
        """What the job could use besides the nodes that are in touch; None while this leader may not say."""
        over = bool(self.verdict or self._request)
        if not over and (self._first or not self.leads):
            return None
        pays = self.policy.free_growth or self.restarts < self.policy.max_restarts or self._stage == "gather"
        return self._peers.needs(0 if over or not pays else self.policy.wanted, over=over)

    @property
    def next_expiry(self) -> float:
        """When, on the leader's clock, something is due even if nothing arrives before."""
        due = min(self._peers.next_silence, self._again)
        return min(due, self._world.failed_at + SETTLE) if self._world.failure else due

    @property
    def has_news(self) -> bool:
        """Whether ``decide`` has something to look at."""
        return self._news

    @property
    def wanted_store(self) -> int | None:
        """The round whose store should be opened next. One is always opened ahead of its need."""
        wanted = self.round + (self._stage == "run")
        return wanted if wanted not in self._stores and self.leads and not self.verdict else None

    # inside

    @property
    def _is_settled(self) -> bool:
        return self._mandate.is_settled(self._world.formed)

    def _was_member(self, node: int) -> bool:
        """Whether it comes from the world that is taken over: its workers are being stopped, it is waited for."""
        return not self._first and self._inherited != "" and node in self.roster.members

    def _refuse(self, conn: int, status: Status, reason: str) -> None:
        self._orders.refused[conn] = reason
        self._peers.saw(status.node)
        self._news = True
        self._event("unfit" if status.unfit else "refused", node=status.name, reason=reason)

    def _on_progress(self, status: Status) -> None:
        self._progress.step = max(self._progress.step, status.step)
        self._world.steps.hear(status, first=status.node == self._world.formed[0])
        self._world.starts.hear(status)
        self._world.going = self._world.going or status.step >= 0 or status.listens

    def _on_state(self, status: Status, now: float) -> None:
        if status.state == "succeeded":
            self._world.on_success(status)
        elif status.state == "failed" and (failure := status.failure):
            first = self._world.on_failure(failure, now)
            self._event("failure", round=self.round, first=first, **asdict(failure))
            if first:
                self._world.repeated = self._progress.is_repeated(failure, now - self._world.since)

    def _is_ready(self, status: Status) -> bool:
        return status.state == "idle" and (self._stage == "run" or status.round == self.round)

    def _view(self, now: float) -> View:
        joined, peers = self._peers.joined, self._peers.by_node
        leaving = {node for node, status in joined.items() if status.leaving or node in self._peers.leaving}
        live = joined.keys() - leaving
        idle = {node for node, status in joined.items() if self._is_ready(status)}
        newcomers = idle & live - set(self._world.formed)
        if self.policy.fit(live):
            self._min_since = now if self._min_since is None else self._min_since
            self._below_min = now
        else:
            self._min_since = None
        if self._stage == "run" or self.round in self._stores:
            self._had_store = now
        late = self._stage == "run" and now - self._world.since > self.policy.heartbeat_timeout
        if self._mandate.renew(joined.values(), self._peers.agreeing, now, stale=late and not self._is_settled):
            self._event("take_over", round=self.round, reason=self._inherited)
        world = self._world
        ended, cause = world.end(self._inherited)
        last = self._mandate.last
        return View(
            formed=frozenset(world.formed) - world.lost.keys(),
            lost=frozenset(world.lost),
            succeeded=frozenset(world.succeeded),
            failure=ended,
            cause=cause,
            settling=world.is_settling(now),
            repeated=world.repeated,
            ready=frozenset(idle & live),
            live=frozenset(live),
            leaving=frozenset(leaving),
            idle=frozenset(idle),
            since_newcomer=now - self._peers.since(newcomers) if newcomers else 0.0,
            starting=self._coming.starting,
            coming=self._coming.all,
            since_growth=now - self._grown,
            since_formed=now - world.since if world.formed else 0.0,
            going=world.going,
            listens=any(peers[node].status.listens for node in world.formed if node in peers),
            change=world.change,
            since_change=now - world.changing_since,
            absent=max(0, self._granted - len(self._peers.seen)),
            first=self._first,
            since_start=now - self._started,
            since_min=now - self._min_since if self._min_since is not None else 0.0,
            below_min=now - self._below_min,
            quorum=self.leads,
            without_quorum=now - self._mandate.last_granted,
            expected=len(set(self.roster.members) - live - {last.leader}) if last and not world.formed else 0,
            since_quorum=now - self._mandate.since,
            store_ready=self.round in self._stores,
            store_error=self._store_error,
            without_store=now - self._had_store,
            restarts=self.restarts,
            requeues=self.requeues,
            request=self._request,
            requested_for=self._requested_for,
            since_request=now - self._requested,
            drained=world.drained,
        )

    def _advance(self, now: float) -> None:
        self._news, self._again = False, float("inf")
        while not self.verdict and not self.abdicated:
            decision = decide(self._view(now), self.policy)
            if decision.action is Action.WAIT:
                self._waiting, self._again = decision.reason, now + decision.again
                return
            self._act(decision, now)

    def _act(self, decision: Decision, now: float) -> None:
        if decision.action is Action.ABDICATE:
            self.abdicated = self._last_loss or decision.reason
            if self.has_led:
                self._event("abdicate", round=self.round, reason=decision.reason)
            return
        self._reason = decision.reason
        if decision.action is Action.FORM:
            self._form(decision, now)
        elif decision.action is Action.DRAIN:
            self._world.change, self._world.changing_since = decision, now
            self._event("drain", round=self.round, reason=decision.reason)
        elif decision.action is Action.RELEASE:
            for node in decision.nodes:
                conn = self._peers.conns[node]
                peer = self._peers.remove(conn)
                assert peer
                self._orders.refused[conn] = reason = self._peers.why_leaving(peer.status) or decision.reason
                self._event("release", node=peer.status.name, reason=reason)
        elif decision.action is Action.GATHER:
            self._progress.on_end(self._world.failure)
            if decision.grows:
                self._grown = now
            self._tell_progress(now, over=True)
            if self._inherited:  # the round that is being gathered is a new one already
                self._inherited = ""
            else:
                self._clear_round(now)
            self.restarts += decision.charged
            self._event("restart", round=self.round, restarts=self.restarts, reason=decision.reason)
        else:
            self._end(decision, now)

    def _form(self, decision: Decision, now: float) -> None:
        peers = self._peers.by_node
        first = peers[decision.nodes[0]]
        addr = first.status.host.addresses[0] if first.addr.startswith("127.") else first.addr
        size = len(decision.nodes)
        plans = {
            node: Plan(rank, size, self.restarts, self._stores[self.round], addr)
            for rank, node in enumerate(decision.nodes)
        }
        self._stage, self._first, self._last_loss = "run", False, ""
        self._world = World(decision.nodes, plans, now)
        bases = self._mandate.add(Base(self.round, self._node, tuple(filter(votes, decision.nodes))))
        hosts = tuple(peer.status.host for _, peer in sorted(peers.items()) if peer.joined)
        mark = f"{self.round}.{self._node}.{now:.6f}"  # no leader forms twice in a moment
        self._mandate.hand_out(Roster(self.round, hosts, bases, self.restarts, self.requeues, decision.nodes, mark))
        self._event(
            "round",
            round=self.round,
            nodes=[peers[node].status.name for node in decision.nodes],
            world_size=size * self._nproc,
            restarts=self.restarts,
            leader=peers[self._node].status.name if self._node in peers else None,
        )

    def _tell_progress(self, now: float, *, over: bool = False) -> None:
        if news := self._world.starts.news(len(self._world.formed) * self._nproc, over=over):
            self._event("started", round=self.round, **news)
        if news := self._world.steps.news(now, over=over):
            self._event("progress", round=self.round, **news)

    def _clear_round(self, now: float) -> None:
        self.round = max(self.round, self._highest) + 1
        self._stage, self._world, self._gathered = "gather", World(), now

    def _end(self, decision: Decision, now: float) -> None:
        outcome = _OUTCOMES[decision.action]
        self._progress.on_end(self._world.failure)
        self._tell_progress(now, over=True)
        ended, failure = self.round, self._progress.last_failure
        if outcome == "requeue":
            self.requeues += decision.charged
        if outcome != "finished":
            self._clear_round(now)
        self.verdict = Verdict(
            outcome,
            decision.cause,
            decision.reason,
            None if outcome == "finished" else failure,
            self.restarts,
            self.requeues,
            ended,
        )
        self._event("verdict", **asdict(self.verdict))

    def _event(self, name: str, **fields: Any) -> None:
        self._events.append((name, fields))
