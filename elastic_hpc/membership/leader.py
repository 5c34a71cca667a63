"""The leader of a job: a state machine without sockets, clocks, files or threads.

Its inputs are what has arrived (``on_...``), with the time; its outputs are collected (``take_...``). The module
``network.server`` connects a leader to the network, the tests connect it to a simulated one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from elastic_hpc.membership.admission import Admission
from elastic_hpc.membership.decisions import Decisions
from elastic_hpc.membership.growth import Needs
from elastic_hpc.membership.hangs import NO_RHYTHM, Rhythm
from elastic_hpc.membership.inputs import Arrivals, Requests, Stores
from elastic_hpc.membership.links import Links
from elastic_hpc.membership.mandate import Mandate
from elastic_hpc.membership.messages import Request, Status
from elastic_hpc.membership.nodes import fold
from elastic_hpc.membership.orders import Orders, ToAgent
from elastic_hpc.membership.peers import Peer, Peers, deciding_fields
from elastic_hpc.membership.policy import Policy, Verdict, View
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.rounds import BARRED, Rounds
from elastic_hpc.membership.rules import requeue_or_fail
from elastic_hpc.membership.sizing import Answer, Sizing
from elastic_hpc.membership.standstill import Reached
from elastic_hpc.membership.strikes import Strike
from elastic_hpc.membership.wishes import Bounds, Parting, Wishes
from elastic_hpc.membership.yielding import Holding

STOP_TIMEOUT = 60.0
"""Seconds in which an agent must report that its workers are gone; then the leader gives the agent up, as its workers
cannot be killed.
"""


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
        """``promises``: this node's. If they hold a roster, take over, because of ``reason``, as soon as a majority
        agrees. Else lead from the start, with the counters of the previous run. ``granted`` and ``granted_names``: as
        in ``Peers``. ``supplied``: ``agent.supply`` brings the nodes of ``needs``. ``host``: this node's; all nodes
        must have its software. ``strikes``: from earlier runs. ``bounds``: from an earlier run, instead of those in
        ``policy``. ``gives_back``: as in ``Sizing``. ``rhythm``: what was learned in earlier runs.
        """
        self._promises = promises or Promises()
        inherited = self._promises.roster
        roster = inherited or Roster(round, (), (), restarts, requeues)
        self.node = node
        self.has_news = True
        """Whether anything has arrived that ``decide`` has yet to act upon."""

        self._mandate = Mandate(roster, inherited=inherited is not None, now=now)
        timeout = policy.heartbeat_timeout
        self.peers = Peers(roster.hosts, timeout, now, granted=granted, granted_names=granted_names)
        self.peers.barred = dict.fromkeys(roster.barred, BARRED)
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._sizing = Sizing(policy, bounds, self._promises, self.peers, self._event, node=node, gives_back=gives_back)
        held = (self._mandate, self._promises, self.peers, self._event)
        rhythm = max(rhythm, self._promises.rhythm)
        self._rounds = Rounds(*held, strikes, node=node, nproc=nproc, now=now, reason=reason, rhythm=rhythm)
        self.stalls = False
        """The record cannot be written at present, as its file system does not answer."""
        self._requests, self._stores, self._arrivals = Requests(), Stores(now), Arrivals(supplied=supplied)
        self._orders = Orders()
        agents = (self.peers, self._orders, self._rounds, self._arrivals)
        self._admission = Admission(*agents, self._event, nproc, host)
        links = Links(self.peers, self._sizing, self._event, node)
        parts = (self._mandate, self.peers, self._admission, self._sizing, links, self._rounds)
        inputs = (self._requests, self._stores, self._arrivals)
        self._decisions = Decisions(*parts, *inputs, self._event, reason or "the agents have not joined yet")

    # inputs

    def on_status(self, conn: int, addr: str, status: Status, now: float, *, boot: str = "") -> None:
        """``status`` arrived over connection ``conn`` from ``addr``, from the process ``boot`` of the agent."""
        if self._admission.is_over(conn):
            return
        peer = self.peers.get(conn)
        if peer is None:
            if refusal := self._admission.refuse(conn, status, boot):
                self.has_news = True
                if refusal.final and status.node == self.node and self._rounds.first:
                    self._rounds.end(requeue_or_fail(refusal.reason, self.requeues, self.policy), now)
                return
            if (older := self.peers.conns.get(status.node)) is not None:
                self.on_lost(older, "its agent has connected again")
                self.decide(now)
            peer = Peer(status, addr, now, now, boot)
            self.peers.add(conn, peer)
            self._rounds.on_seen(status.seen, now)
            is_news = True
        elif status.seq <= peer.status.seq:
            return
        elif status.unfit:
            self.has_news |= self._admission.give_up(peer, status, now)
            return
        else:
            is_news = deciding_fields(status) != deciding_fields(peer.status)
            is_news = is_news or peer.status.last_order < self.peers.fresh_order <= status.last_order
        self.has_news = self.has_news or is_news
        self.peers.on_status(peer, status, now)
        self._mandate.on_status(status)
        if not peer.joined and (status.state == "idle" or self._rounds.is_being_stopped(status.node)):
            self._admission.join(peer, now)
        self._rounds.hangs.adopt(status.rhythm)
        if self._sizing.adopt(status.wishes):
            self.has_news = True
        self._rounds.on_status(status, now, is_news=is_news)

    def on_roster(self, roster: Roster) -> None:
        """An agent holds ``roster``. A leader that has yet to take over adopts a later roster than its own."""
        self.has_news |= self._rounds.on_roster(roster)

    def on_lost(self, conn: int, reason: str, *, silent: float = 0.0) -> None:
        """Connection ``conn`` is gone, or must be given up for ``reason``, after ``silent`` seconds of silence."""
        self.has_news |= self._admission.lose(conn, reason, silent)

    def on_request(self, request: Request, reason: str, now: float) -> None:
        """A peer that holds the secret requests a drain or the end of the job. ``reason``: ``time limit``,
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
        """``node``, given by number or Slurm's name, must leave at a step boundary, because of ``reason``. ``exclude``:
        the node is not fit, and a requeue avoids it too; the leader's node stays, but without workers. ``give_back``:
        Slurm gets the node back, if it is the job's own. Without both, the node is a joiner whose job is about to end.
        ``by``: when the node will be taken away, in seconds since the epoch. The same request may come again.
        """
        found = self.peers.find(node)
        if found is None and isinstance(node, str):
            return Answer(refusal=f"{node} is not a node of this job; its nodes: {fold(self.peers.all_names)}")
        number, name = (found.node, found.name) if found else (int(node), "")  # a joiner that is not connected yet
        parting = Parting(number, name, reason, exclude, give_back, by)
        view = self._view(now)
        answer = self._sizing.leave(parting, view.live, found, settled=view.settled)
        self._advance(now)
        return answer

    def on_stay(self, name: str, now: float) -> Answer:
        """The node that Slurm calls ``name`` no longer has to leave, and the job no longer avoids it."""
        answer = self._sizing.stay(name)
        self._advance(now)
        return answer

    def on_resize(self, bounds: Bounds, now: float) -> Answer:
        """``bounds`` hold for the world from now on, also after a take-over."""
        view = self._view(now)
        answer = self._sizing.resize(bounds, view.live, view.formed)
        self._advance(now)
        return answer

    def on_cap(self, nodes: int | None, reason: str, now: float) -> None:
        """For a while the job may hold at most ``nodes`` nodes, but never fewer than MIN; None ends this limit."""
        self._sizing.cap(nodes, reason)
        self._advance(now)

    def on_given_back(self, nodes: Collection[int], now: float) -> None:
        """Slurm has taken back ``nodes`` of ``needs.surplus``."""
        self._sizing.on_given_back(nodes)
        self._advance(now)

    def on_coming(self, needs: Needs, starting: int, pending: int, now: float) -> None:
        """In answer to ``needs``: how many agents are starting, and how many nodes were requested from Slurm."""
        self._arrivals.update(starting, pending, up_to_date=needs == self.needs)
        self._advance(now)

    def on_store(self, round: int, port: int, now: float) -> None:
        """The store of ``round`` listens on ``port``."""
        self._stores.opened(round, port, current=self.round)
        self._advance(now)

    def on_store_failed(self, round: int, reason: str, now: float) -> None:
        """The store of ``round`` could not be opened, because of ``reason``; the server tries again."""
        if self._stores.failed(reason):
            self._event("store_failed", round=round, reason=reason)
        self._advance(now)

    def on_tick(self, now: float, wall: float = 0.0) -> None:
        """Declare silent agents lost, and decide. Call this a few times per heartbeat. ``wall``: the time in seconds
        since the epoch.
        """
        self._check_freeze(now)
        for conn, silent in self.peers.silent(now).items():
            self.on_lost(conn, f"no heartbeat for {self.policy.heartbeat_timeout:g} s", silent=silent)
        if self._rounds.stage == "gather" and now - self._rounds.gathering_since > STOP_TIMEOUT:
            for conn, peer in list(self.peers.items()):
                if peer.joined and not self._rounds.is_idle(peer.status):
                    self.on_lost(conn, f"its workers did not stop within {STOP_TIMEOUT:g} s")
        for conn, since in list(self._admission.leaving.items()):
            if now - since > STOP_TIMEOUT:  # its agent is frozen
                self.on_lost(conn, "its agent did not leave")
                self._admission.dropped.append(conn)
        self._decisions.look_at_workers(now, wall, held=self.stalls)
        self._advance(now)
        self._rounds.record_progress(now)
        self._decisions.record_waiting(now)

    def on_saved(self) -> None:
        """The verdict is on disk, or cannot be written: the agents may leave."""
        self._rounds.stage = "end"

    def decide(self, now: float) -> None:
        """Act upon what has arrived. Call this when all statuses that have arrived are stored."""
        if self.has_news:
            self._advance(now)

    # outputs

    @property
    def policy(self) -> Policy:
        """What the user allows now."""
        return self._sizing.policy

    @property
    def wishes(self) -> Wishes:
        """The size that the job should have, and the nodes that must leave."""
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
    def abdicated(self) -> str:
        """Why this leader stopped without a verdict; empty if it did not."""
        return self._rounds.abdicated

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
        order, plans = self._decisions.order()
        return self._orders.take(self.peers, order, plans, self.roster, self._mandate.change, beat=beat)

    def take_events(self) -> list[tuple[str, dict[str, Any]]]:
        """What happened since the last call, for the record: ``(name, fields)``."""
        events, self._events = self._events, []
        return events

    def take_dropped(self) -> list[int]:
        """Connections to close."""
        dropped, self._admission.dropped = self._admission.dropped, []
        return dropped

    @property
    def needs(self) -> Needs | None:
        """What the job could use besides the connected nodes. Unless the job ends, None before the first round and
        without a majority.
        """
        over = bool(self.verdict or self._requests.request)
        if not over and (self._rounds.first or not self.leads):
            return None
        pays = self.policy.free_growth or self.restarts < self.policy.max_restarts or self._rounds.stage == "gather"
        surplus = () if over or self._admission.leaving else self._sizing.surplus
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
        due = min(self.peers.next_silence, self._decisions.decide_at)
        return min(due, self._rounds.world.settled_at) if self._rounds.world.settled_at else due

    @property
    def wanted_store(self) -> int | None:
        """The round whose store should be opened next. One store is always opened before it is needed."""
        wanted = self.round + (self._rounds.stage == "run")
        return wanted if wanted not in self._stores.ports and self.leads and not self.verdict else None

    # decisions

    def _check_freeze(self, now: float) -> None:
        if self.peers.check_freeze(now, self._orders.next):
            self._mandate.on_freeze(now)

    def _advance(self, now: float) -> None:
        self._check_freeze(now)
        self.has_news = False
        self._decisions.advance(now)

    def _view(self, now: float) -> View:
        return self._decisions.view(self.peers.joined, now)

    def _event(self, name: str, **fields: Any) -> None:
        self._events.append((name, fields))
