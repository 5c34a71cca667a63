"""The leader of a job: a state machine without sockets, clocks, files or threads.

Its inputs are what has arrived (``on_...``), with the time; its outputs are collected (``take_...``). The module
``network.server`` connects a leader to the network, the tests connect it to a simulated one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from elastic_hpc.membership.admission import Admission, Refusal
from elastic_hpc.membership.growth import Needs
from elastic_hpc.membership.hangs import NO_RHYTHM, Rhythm
from elastic_hpc.membership.inputs import Arrivals, Requests, Stores
from elastic_hpc.membership.links import Links
from elastic_hpc.membership.mandate import Mandate
from elastic_hpc.membership.messages import Order, Request, Status
from elastic_hpc.membership.nodes import fold, votes
from elastic_hpc.membership.orders import Orders, ToAgent
from elastic_hpc.membership.peers import Peer, Peers, deciding_fields
from elastic_hpc.membership.policy import Action, Decision, Policy, Verdict, View
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.rounds import BARRED, Rounds
from elastic_hpc.membership.rules import decide, requeue_or_fail
from elastic_hpc.membership.sizing import Answer, Sizing
from elastic_hpc.membership.standstill import Reached
from elastic_hpc.membership.strikes import Strike
from elastic_hpc.membership.wishes import Bounds, Parting, Wishes
from elastic_hpc.membership.yielding import Holding

STOP_TIMEOUT = 60.0
"""Seconds in which an agent must report that its workers are gone; then it is given up, as they cannot be killed."""


class Leader:
    """Membership and rounds of one job. ``now`` is always the leader's own monotonic clock, in seconds.

    ``on_status`` only stores a status, and ``decide`` acts upon it: a thousand statuses that arrive together lead to
    one decision, and heartbeats without news to none.
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
        promises: Promises | None = None,
        reason: str = "",
        supplied: bool = False,
        host: Host | None = None,
        strikes: Collection[Strike] = (),
        bounds: Bounds | None = None,
        gives_back: bool = True,
        rhythm: Rhythm = NO_RHYTHM,
    ) -> None:
        """``promises``: those of this node. If it holds a roster, take over, because of ``reason``, as soon as a
        majority agrees. Else lead from the start, with the counters of the run before. ``granted`` and
        ``granted_names``: as in ``Peers``. ``supplied``: ``agent.supply`` brings the nodes of ``needs``. ``host``: that
        of this node; all nodes must have its software. ``strikes``: those of the runs before. ``bounds``: those that
        a run before had, instead of those of ``policy``. ``gives_back``: as in ``Sizing``. ``rhythm``: what was learned
        in the runs before.
        """
        self._promises = promises or Promises()
        inherited = self._promises.roster
        roster = inherited or Roster(round, (), (), restarts, requeues)
        self.node = node

        self.abdicated = ""
        """Why this leader stopped without a verdict: the last loss of a node, else the lack of a majority."""
        self.has_news = True
        """Whether anything has arrived that ``decide`` has yet to act upon."""

        self._mandate = Mandate(roster, inherited=inherited is not None, now=now)
        timeout = policy.heartbeat_timeout
        self.peers = Peers(roster.hosts, timeout, now, granted=granted, granted_names=granted_names)
        self.peers.barred = dict.fromkeys(roster.barred, BARRED)
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._sizing = Sizing(policy, bounds, self._promises, self.peers, self._event, node=node, gives_back=gives_back)
        self._links = Links(self.peers, self._sizing, self._event, node)
        self._leaving: dict[int, float] = {}
        """The connections of the job's own nodes that were let go and whose agents have not left, and since when. Slurm
        gets all of them back at once: without accounting it takes no second change.
        """
        parts = (self._mandate, self._promises, self.peers, self._event)
        rhythm = max(rhythm, self._promises.rhythm)
        self._rounds = Rounds(*parts, strikes, node=node, nproc=nproc, now=now, reason=reason, rhythm=rhythm)
        self.stalls = False
        """The record cannot be written at present, as its file system does not answer."""
        self._requests, self._stores, self._arrivals = Requests(), Stores(now), Arrivals(supplied=supplied)
        self._orders, self._admission = Orders(), Admission(nproc, host)

        self._reason = self._waiting = self._waiting_recorded = reason or "waiting for nodes"
        """The reasons of the last action, of the present wait, and of the wait that was recorded last."""
        self._decide_at = float("inf")
        """When to decide again, even if nothing arrives."""
        self._dropped: list[int] = []

    # inputs

    def on_status(self, conn: int, addr: str, status: Status, now: float, *, boot: str = "") -> None:
        """``status`` arrived over connection ``conn`` from ``addr``, from the process ``boot`` of the agent."""
        if self._orders.is_refused(conn) or conn in self._dropped:
            return
        peer = self.peers.get(conn)
        if peer is None:
            if refusal := self._admission.refusal(status, boot, self.peers):
                self._refuse(conn, status, refusal, now)
                return
            peer = self._connect(conn, addr, status, now, boot)
            is_news = True
        elif status.seq <= peer.status.seq:
            return
        elif status.unfit:
            self._give_up(peer, status, now)
            return
        else:
            is_news = deciding_fields(status) != deciding_fields(peer.status)
            is_news = is_news or peer.status.last_order < self.peers.fresh_order <= status.last_order
        self.has_news = self.has_news or is_news
        self.peers.on_status(peer, status, now)
        self._mandate.on_status(status)
        if not peer.joined and (status.state == "idle" or self._rounds.is_being_stopped(status.node)):
            peer.joined, peer.arrived_at = True, now
            self.peers.on_arrival(status.node)
            self._event("join", node=status.name, addr=addr, joiner=not votes(status.node))
            self._arrivals.outdate()
        self._rounds.hangs.adopt(status.rhythm)
        if self._sizing.adopt(status.wishes):
            self.has_news = True
        self._rounds.on_status(status, now, is_news=is_news)

    def on_roster(self, roster: Roster) -> None:
        """An agent holds ``roster``. A leader that has yet to take over adopts a later roster than its own."""
        if not self.leads and self._rounds.stage == "gather" and self._mandate.on_roster(roster):
            self._promises.accept(roster)
            self._rounds.on_roster(roster)
            self.peers.barred |= dict.fromkeys(roster.barred, BARRED)
            self.peers.add_known(roster.hosts)
            self.has_news = True

    def on_lost(self, conn: int, reason: str, *, silent: float = 0.0) -> None:
        """Connection ``conn`` is gone, or must be given up for ``reason``, after ``silent`` seconds of silence."""
        self._orders.forget(conn)
        if self._leaving.pop(conn, None) is not None:
            self.has_news = True
        peer = self.peers.remove(conn)
        if peer is None:
            return
        self._dropped.append(conn)
        if self.verdict or self.abdicated or not peer.joined:
            return
        status = peer.status
        why = self.peers.why_leaving(status)
        name, reason = ("left", why) if why else ("lost", reason)
        self._event(name, node=status.name, reason=reason, round=self.round, silent=round(silent, 3))
        self._lose(status.node, f"{status.name} lost: {reason}")

    def on_request(self, request: Request, reason: str, now: float) -> None:
        """Somebody who holds the secret requests a drain or the end of the job. ``reason``: ``time limit``,
        ``preempted`` or ``user``, or the words of a worker that requests the end. The same request may come again.
        """
        if self._requests.add(request, reason, now):
            self._event("request", request=request, reason=reason)
            self._advance(now)

    def on_leave(
        self,
        node: int | str,
        reason: str,
        now: float,
        *,
        exclude: bool = False,
        give_back: bool = False,
        by: float | None = None,
    ) -> Answer:
        """``node``, its number or Slurm's name of it, has to go at a step boundary, because of ``reason``. ``exclude``:
        the node is not fit, and a requeue avoids it too; the leader's node stays, but without workers. ``give_back``:
        Slurm gets the node back, if it is the job's own. Without both, the job of the node, a joiner, is about to end.
        ``by``: when the node will be taken away, in seconds since the epoch. The same request may come again.
        """
        found = self.peers.find(node)
        if found is None and isinstance(node, str):
            return Answer(refusal=f"{node} is no node of this job; it has {fold(self.peers.all_names)}")
        number, name = (found.node, found.name) if found else (int(node), "")  # a joiner that is not connected yet
        parting = Parting(number, name, reason, exclude, give_back, by)
        view = self._view(self.peers.joined, now)
        answer = self._sizing.leave(parting, view.live, found, settled=view.settled)
        self._advance(now)
        return answer

    def on_stay(self, name: str, now: float) -> Answer:
        """The node that Slurm calls ``name`` need not go any more, and is not avoided any more."""
        answer = self._sizing.stay(name)
        self._advance(now)
        return answer

    def on_resize(self, bounds: Bounds, now: float) -> Answer:
        """From now on, over take-overs too, a world may have ``bounds``."""
        view = self._view(self.peers.joined, now)
        answer = self._sizing.resize(bounds, view.live, view.formed)
        self._advance(now)
        return answer

    def on_cap(self, nodes: int | None, reason: str, now: float) -> None:
        """For a while the job is to hold at most ``nodes`` nodes, but never fewer than MIN; None: no more."""
        self._sizing.cap(nodes, reason)
        self._advance(now)

    def on_given_back(self, nodes: Collection[int], now: float) -> None:
        """Slurm has ``nodes`` of ``needs.surplus`` back."""
        self._sizing.on_given_back(nodes)
        self._advance(now)

    def on_coming(self, needs: Needs, starting: int, pending: int, now: float) -> None:
        """In answer to ``needs``: how many agents are starting, and how many nodes Slurm was asked for."""
        self._arrivals.update(starting, pending, up_to_date=needs == self.needs)
        self._advance(now)

    def on_store(self, round: int, port: int, now: float) -> None:
        """The store of ``round`` listens on ``port``."""
        self._stores.opened(round, port, current=self.round)
        self._advance(now)

    def on_store_failed(self, round: int, reason: str, now: float) -> None:
        """The store of ``round`` could not be opened, because of ``reason``; it is tried again."""
        if self._stores.failed(reason):
            self._event("store_failed", round=round, reason=reason)
        self._advance(now)

    def on_tick(self, now: float, wall: float = 0.0) -> None:
        """Declare silent agents lost, and decide. To be called a few times per heartbeat. ``wall``: the time in seconds
        since the epoch.
        """
        self._check_freeze(now)
        for conn, silent in self.peers.silent(now).items():
            self.on_lost(conn, f"no heartbeat for {self.policy.heartbeat_timeout:g} s", silent=silent)
        if self._rounds.stage == "gather" and now - self._rounds.gathering_since > STOP_TIMEOUT:
            for conn, peer in list(self.peers.items()):
                if peer.joined and not self._rounds.is_idle(peer.status):
                    self.on_lost(conn, f"its workers did not stop within {STOP_TIMEOUT:g} s")
        for conn, since in list(self._leaving.items()):
            if now - since > STOP_TIMEOUT:  # its agent is frozen
                self.on_lost(conn, "it did not leave")
                self._dropped.append(conn)
        if self.policy.learns_hangs and self.leads and not self._requests.request:
            self.has_news |= self._rounds.look_for_hang(now, wall, held=self.stalls)
        if self.policy.slow_factor and self.leads and not self._requests.request:
            self._look_for_slow(now)
        self._advance(now)
        self._rounds.record_progress(now)
        if self._rounds.stage == "gather" and now - self._rounds.gathering_since > 1 and not self.verdict:
            absent = self.peers.absent_names if self._rounds.first else ""
            waiting = self._waiting + (f"; not joined yet: {absent}" if absent else "")
            if waiting != self._waiting_recorded:
                self._waiting_recorded = waiting
                self._event("waiting", round=self.round, reason=waiting)

    def on_saved(self) -> None:
        """The verdict is on disk, or cannot be written: the agents may leave."""
        self._rounds.stage = "end"

    def decide(self, now: float) -> None:
        """Act upon what has arrived. To be called when all statuses that have arrived are stored."""
        if self.has_news:
            self._advance(now)

    # outputs

    @property
    def policy(self) -> Policy:
        """What the user allows by now."""
        return self._sizing.policy

    @property
    def wishes(self) -> Wishes:
        """What is wanted of the job's nodes."""
        return self._sizing.wishes

    @property
    def rhythm(self) -> Rhythm:
        """What has been learned of the job's signs of life."""
        return self._rounds.hangs.rhythm

    @property
    def round(self) -> int:
        """The round that is gathered or runs."""
        return self._rounds.round

    @property
    def restarts(self) -> int:
        return self._rounds.restarts

    @property
    def verdict(self) -> Verdict | None:
        return self._rounds.verdict

    @property
    def requeues(self) -> int:
        return self._rounds.requeues

    @property
    def leads(self) -> bool:
        """Whether enough nodes agree: without them a leader decides nothing."""
        return self._mandate.granted

    @property
    def has_led(self) -> bool:
        return self._mandate.ever_granted

    @property
    def roster(self) -> Roster:
        """What the agents hold since the last round was formed."""
        return self._mandate.roster

    def take_orders(self, *, beat: bool = False) -> dict[int, list[ToAgent]]:
        """What to send, by connection: the orders that have changed, or with ``beat`` an order for every agent."""
        runs, failure = self._rounds.stage == "run", self._rounds.failures.last_failure
        world, drains = self._rounds.world, self._requests.request in {"drain", "save-and-stop"}
        order = Order(
            seq=0,
            stage=self._rounds.stage,
            round=self.round,
            reason=self._reason,
            outcome=self.verdict.outcome if self.verdict and self._rounds.stage == "end" else None,
            roster=self.roster.round,
            leads=self.leads,
            oldest=self._mandate.oldest,
            drain=runs and bool(drains or world.change),
            new_world=runs and not drains and bool(world.change and world.change.in_place),
            stacks=bool(self._rounds.stage == "gather" and failure and failure.kind == "hang"),
            live=runs and world.live,
            wishes=self.wishes,
            rhythm=self.rhythm,
            probe=self._links.probe.number,
            among=self._links.among,
        )
        plans = world.plans if runs and self.leads and self._mandate.is_settled(world.formed) else {}
        return self._orders.take(self.peers, order, plans, self.roster, self._mandate.change, beat=beat)

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """What happened since the last call, for the record: ``(name, fields)``."""
        events, self._events = self._events, []
        return events

    def take_dropped(self) -> list[int]:
        """Connections that are to be closed."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @property
    def needs(self) -> Needs | None:
        """What the job could use besides the nodes connected. Unless the job ends, None before the first round and
        without a majority.
        """
        over = bool(self.verdict or self._requests.request)
        if not over and (self._rounds.first or not self.leads):
            return None
        pays = self.policy.free_growth or self.restarts < self.policy.max_restarts or self._rounds.stage == "gather"
        surplus = () if over or self._leaving else self._sizing.surplus
        return self.peers.needs(0 if over or not pays else self.policy.wanted, over=over, surplus=surplus)

    def holding(self, job: str) -> Holding | None:
        """See ``Sizing.holding``. None before the first round and without a majority."""
        return self._sizing.holding(job) if self.leads and not self._rounds.first else None

    @property
    def progress(self) -> Reached:
        """How far the job is."""
        return self._rounds.progress

    @property
    def next_expiry(self) -> float:
        """When, on the leader's clock, ``on_tick`` is due even if nothing arrives before."""
        due = min(self.peers.next_silence, self._decide_at)
        return min(due, self._rounds.world.settled_at) if self._rounds.world.settled_at else due

    @property
    def wanted_store(self) -> int | None:
        """The round whose store should be opened next. One store is always opened ahead of its need."""
        wanted = self.round + (self._rounds.stage == "run")
        return wanted if wanted not in self._stores.ports and self.leads and not self.verdict else None

    # agents

    def _refuse(self, conn: int, status: Status, refusal: Refusal, now: float) -> None:
        self._orders.refuse(conn, refusal)
        self.has_news = True
        if refusal.is_new:
            self._event("unfit" if status.unfit else "refused", node=status.name, reason=refusal.reason)
        if refusal.final:
            self.peers.on_arrival(status.node)
            if status.node == self.node and self._rounds.first:
                self._rounds.end(requeue_or_fail(refusal.reason, self.requeues, self.policy), now)

    def _connect(self, conn: int, addr: str, status: Status, now: float, boot: str) -> Peer:
        """Add a peer for an agent with a new connection, which replaces the connection that it had before."""
        older = self.peers.conns.get(status.node)
        if older is not None:
            self.on_lost(older, "its agent has connected again")
            self.decide(now)
        peer = Peer(status, addr, now, now, boot)
        self.peers.add(conn, peer)
        self._rounds.on_seen(status.seen, now)
        return peer

    def _give_up(self, peer: Peer, status: Status, now: float) -> None:
        """The processes of a node that took part cannot be killed: the node stays out, and its agent, which may be this
        leader's own, leaves when the job ends.
        """
        self.peers.on_status(peer, status, now)
        if peer.joined:
            peer.joined = False
            self.peers.barred[status.name] = "its processes cannot be killed"
            self._event("lost", node=status.name, reason=status.unfit, round=self.round, silent=0.0)
            self._lose(status.node, f"{status.name} lost: {status.unfit}")

    def _lose(self, node: int, reason: str) -> None:
        self._arrivals.outdate()
        self._rounds.on_lost(node, reason)
        self.has_news = True

    # decisions

    def _check_freeze(self, now: float) -> None:
        if self.peers.check_freeze(now, self._orders.next):
            self._mandate.on_freeze(now)

    def _advance(self, now: float) -> None:
        self._check_freeze(now)
        self.has_news, self._decide_at = False, float("inf")
        while not self.verdict and not self.abdicated:
            joined = self.peers.joined
            self._renew_mandate(joined, now)
            self._look_at_links(joined, now)
            decision = decide(self._view(joined, now), self.policy)
            if decision.action is Action.WAIT:
                self._waiting, self._decide_at = decision.reason, now + decision.again
                return
            self._act(decision, now)

    def _renew_mandate(self, joined: dict[int, Status], now: float) -> None:
        world = self._rounds.world
        late = self._rounds.stage == "run" and now - world.formed_at > self.policy.heartbeat_timeout
        stale = late and not self._mandate.is_settled(world.formed)
        if self._mandate.renew(joined.values(), self.peers.agreeing, now, stale=stale):
            self._event("take_over", round=self.round, reason=self._rounds.predecessor_lost)

    def _look_at_links(self, joined: dict[int, Status], now: float) -> None:
        world = self._rounds.world
        calm = bool(world.formed and not world.failure and not world.lost and self.leads)
        if calm or self._links.probe.number:
            live = lambda: self._view(joined, now).live  # noqa: E731
            if self._links.look(self.round, joined, live, now, calm=calm):
                self._rounds.failures.on_explained()

    def _look_for_slow(self, now: float) -> None:
        seen = self._rounds.look_for_slow(self.policy.slow_factor, now)
        for slow in seen.to_leave if self.policy.leaves_slow else ():
            host = self.peers.by_node[slow.node].status.host
            if host.name not in self.peers.avoided:
                parting = Parting(slow.node, host.name, slow.reason, exclude=True, give_back=True, slow=True)
                view = self._view(self.peers.joined, now)
                self._sizing.leave(parting, view.live, host, settled=view.settled)
        for parting in self.wishes.partings:
            if parting.slow and parting.node in seen.ended:
                self._sizing.stay(parting.name)

    def _view(self, joined: dict[int, Status], now: float) -> View:
        formed, gathers = self._rounds.world.formed, self._rounds.stage != "run"
        idle = {node for node, status in joined.items() if self._rounds.is_idle(status)}
        staying = self._sizing.staying
        nodes = self.peers.view(joined, idle, formed, self.policy, now, staying=staying)
        agree = self._mandate.view(joined, nodes.live, now, running=bool(formed), confirming=self.peers.are_confirming)
        return View(
            **vars(nodes),
            **vars(self._rounds.view(now)),
            **vars(agree),
            **vars(self._links.view(self.round, now)),
            **vars(self._requests.view(now)),
            **vars(self._stores.view(self.round, now, needed=gathers)),
            **vars(self._arrivals.view(now)),
            first=self._rounds.first,
            restarts=self.restarts,
            requeues=self.requeues,
            shrinks=self._sizing.shrinks,
        )

    def _act(self, decision: Decision, now: float) -> None:
        if decision.action is Action.ABDICATE:
            self.abdicated = self._rounds.last_loss or decision.reason
            if self.has_led:
                self._event("abdicate", round=self.round, reason=decision.reason)
            return
        self._reason = decision.reason
        if decision.bars:
            self._rounds.bar(decision.reason)
        match decision.action:
            case Action.FORM:
                self._rounds.form(decision.nodes, self._stores.ports[self.round], now)
            case Action.PROBE:
                self._links.begin(self.round, self._rounds.world.formed, now)
            case Action.DRAIN:
                self._rounds.drain(decision, now)
            case Action.RELEASE:
                self._release(decision, now)
            case Action.GATHER:
                if decision.grows:
                    self._arrivals.on_growth(now)
                self._rounds.gather(decision, now)
            case _:
                self._rounds.end(decision, now)

    def _release(self, decision: Decision, now: float) -> None:
        for node in decision.nodes:
            conn = self.peers.conns[node]
            peer = self.peers.remove(conn, let_go=True)
            assert peer
            reason = self.peers.why_leaving(peer.status) or decision.reason
            self._orders.refuse(conn, Refusal(reason, let_go=True))
            if votes(node):
                self._leaving[conn] = now
            self._sizing.on_release(node, peer.status.host, reason)
            self._event("release", node=peer.status.name, reason=reason)

    def _event(self, name: str, **fields: Any) -> None:
        self._events.append((name, fields))
