"""What a leader decides and does: it acts upon the decisions of ``rules`` until it has to wait. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elastic_hpc.membership.admission import Admission
from elastic_hpc.membership.inputs import Arrivals, Requests, Stores
from elastic_hpc.membership.links import Links
from elastic_hpc.membership.mandate import Mandate
from elastic_hpc.membership.messages import Order, Plan, Status
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.policy import Action, Decision, View
from elastic_hpc.membership.rounds import Rounds
from elastic_hpc.membership.rules import decide
from elastic_hpc.membership.sizing import Sizing
from elastic_hpc.membership.wishes import Parting


@dataclass
class Decisions:
    """The decisions of one leader, which has these parts. Times are on its clock."""

    mandate: Mandate
    peers: Peers
    admission: Admission
    sizing: Sizing
    links: Links
    rounds: Rounds
    requests: Requests
    stores: Stores
    arrivals: Arrivals
    event: Callable[..., None]
    _reason: str
    """The reason of the last action."""
    decide_at: float = float("inf")
    """When to decide again, even if nothing arrives."""

    def __post_init__(self) -> None:
        self._waiting = self._waiting_recorded = self._reason
        """The reasons of the present wait, and of the wait that was recorded last."""

    def advance(self, now: float) -> None:
        """Decide and act until the leader has to wait, or the last round has ended."""
        self.decide_at = float("inf")
        while not self.rounds.are_over:
            joined = self.peers.joined
            self._renew_mandate(joined, now)
            self._look_at_links(joined, now)
            decision = decide(self.view(joined, now), self.sizing.policy)
            if decision.action is Action.WAIT:
                self._waiting, self.decide_at = decision.reason, now + decision.again
                return
            self._act(decision, now)

    def look_at_workers(self, now: float, wall: float, *, held: bool) -> None:
        """See whether workers hang, and which nodes are slow. ``wall``, ``held``: as in ``Rounds.look_for_hang``."""
        if self.mandate.granted and not self.requests.request:
            if self.sizing.policy.learns_hangs:
                self.rounds.look_for_hang(now, wall, held=held)
            if self.sizing.policy.slow_factor:
                self._look_for_slow(now)

    def record_waiting(self, now: float) -> None:
        """Record what a round that is being gathered waits for, if that has changed."""
        rounds = self.rounds
        if rounds.stage == "gather" and now - rounds.gathering_since > 1 and not rounds.verdict:
            absent = self.peers.absent_names if rounds.first else ""
            waiting = self._waiting + (f"; not joined yet: {absent}" if absent else "")
            if waiting != self._waiting_recorded:
                self._waiting_recorded = waiting
                self.event("waiting", round=rounds.round, reason=waiting)

    def order(self) -> tuple[Order, dict[int, Plan]]:
        """What all agents must do now, and the plans of the agents that take part in the running round."""
        rounds, world, mandate = self.rounds, self.rounds.world, self.mandate
        runs, failure, verdict = rounds.stage == "run", rounds.failures.last_failure, rounds.verdict
        drains = self.requests.request in {"drain", "save-and-stop"}
        order = Order(
            seq=0,
            stage=rounds.stage,
            round=rounds.round,
            reason=self._reason,
            outcome=verdict.outcome if verdict and rounds.stage == "end" else None,
            roster=mandate.roster.round,
            leads=mandate.granted,
            oldest=mandate.oldest,
            drain=runs and bool(drains or world.change),
            new_world=runs and not drains and bool(world.change and world.change.in_place),
            stacks=bool(rounds.stage == "gather" and failure and failure.kind == "hang"),
            live=runs and world.live,
            wishes=self.sizing.wishes,
            rhythm=rounds.hangs.rhythm,
            probe=self.links.probe.number,
            among=self.links.among,
        )
        return order, world.plans if runs and mandate.granted and mandate.is_settled(world.formed) else {}

    def view(self, joined: dict[int, Status], now: float) -> View:
        """What the leader sees. ``joined``: the statuses of the nodes that have joined."""
        formed, gathers = self.rounds.world.formed, self.rounds.stage != "run"
        idle = {node for node, status in joined.items() if self.rounds.is_idle(status)}
        nodes = self.peers.view(joined, idle, formed, self.sizing.policy, now, staying=self.sizing.staying)
        agree = self.mandate.view(joined, nodes.live, now, running=bool(formed), confirming=self.peers.are_confirming)
        return View(
            **vars(nodes),
            **vars(self.rounds.view(now)),
            **vars(agree),
            **vars(self.links.view(self.rounds.round, now)),
            **vars(self.requests.view(now)),
            **vars(self.stores.view(self.rounds.round, now, needed=gathers)),
            **vars(self.arrivals.view(now)),
            first=self.rounds.first,
            restarts=self.rounds.restarts,
            requeues=self.rounds.requeues,
            shrinks=self.sizing.shrinks,
        )

    def _renew_mandate(self, joined: dict[int, Status], now: float) -> None:
        world = self.rounds.world
        late = self.rounds.stage == "run" and now - world.formed_at > self.sizing.policy.heartbeat_timeout
        stale = late and not self.mandate.is_settled(world.formed)
        if self.mandate.renew(joined.values(), self.peers.agreeing, now, stale=stale):
            self.event("take_over", round=self.rounds.round, reason=self.rounds.predecessor_lost)

    def _look_at_links(self, joined: dict[int, Status], now: float) -> None:
        world = self.rounds.world
        calm = bool(world.formed and not world.failure and not world.lost and self.mandate.granted)
        if calm or self.links.probe.number:
            live = lambda: self.view(joined, now).live  # noqa: E731
            if self.links.look(self.rounds.round, joined, live, now, calm=calm):
                self.rounds.failures.on_explained()

    def _look_for_slow(self, now: float) -> None:
        seen = self.rounds.look_for_slow(self.sizing.policy.slow_factor, now)
        for slow in seen.to_leave if self.sizing.policy.leaves_slow else ():
            host = self.peers.by_node[slow.node].status.host
            if host.name not in self.peers.avoided:
                parting = Parting(slow.node, host.name, slow.reason, exclude=True, give_back=True, slow=True)
                view = self.view(self.peers.joined, now)
                self.sizing.leave(parting, view.live, host, settled=view.settled)
        for parting in self.sizing.wishes.partings:
            if parting.slow and parting.node in seen.ended:
                self.sizing.stay(parting.name)

    def _act(self, decision: Decision, now: float) -> None:
        if decision.action is Action.ABDICATE:
            self.rounds.abdicate(decision.reason)
            return
        self._reason = decision.reason
        if decision.bars:
            self.rounds.bar(decision.reason)
        match decision.action:
            case Action.FORM:
                self.rounds.form(decision.nodes, self.stores.ports[self.rounds.round], now)
            case Action.PROBE:
                self.links.begin(self.rounds.round, self.rounds.world.formed, now)
            case Action.DRAIN:
                self.rounds.drain(decision, now)
            case Action.RELEASE:
                for node in decision.nodes:
                    host, reason = self.admission.let_go(node, decision.reason, now)
                    self.sizing.on_release(node, host, reason)
                    self.event("release", node=host.name, reason=reason)
            case Action.GATHER:
                if decision.grows:
                    self.arrivals.on_growth(now)
                self.rounds.gather(decision, now)
            case _:
                self.rounds.end(decision, now)
