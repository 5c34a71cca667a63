"""The rounds under a leader: which round is gathered or runs, and how a round begins and ends. Pure.

``Rounds`` carries out the decisions of ``rules`` that begin or end a round. ``world`` has the running round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, replace

from elastic_hpc.membership.election import Base
from elastic_hpc.membership.failures import FailureHistory
from elastic_hpc.membership.hangs import HangWatch, Rhythm, timeout
from elastic_hpc.membership.mandate import Mandate
from elastic_hpc.membership.messages import Failure, Plan, Stage, Status
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.policy import Action, Decision, Outcome, RoundView, Verdict
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Roster, distinct
from elastic_hpc.membership.slow import NO_DIFFERENCE, Comparison, SlowWatch
from elastic_hpc.membership.standstill import Reached
from elastic_hpc.membership.strikes import NEVER_JOINED, Strike
from elastic_hpc.membership.world import World

BARRED = "its workers failed repeatedly"

_LOOK_EVERY = 1.0
"""Seconds between two looks at the silence of the workers."""

_NEWS = 1.5
"""Factor by which the timeout of a hang must change to be recorded again."""

_OUTCOMES: dict[Action, Outcome] = {Action.FINISH: "finished", Action.FAIL: "failed", Action.REQUEUE: "requeue"}


class Rounds:
    """The rounds under one leader. Times are on the leader's clock."""

    def __init__(
        self,
        mandate: Mandate,
        promises: Promises,
        peers: Peers,
        event: Callable[..., None],
        strikes: Collection[Strike],
        *,
        node: int,
        nproc: int,
        now: float,
        reason: str,
        rhythm: Rhythm,
    ) -> None:
        """The values of the ``Leader``, before it has formed a round. ``event(name, **fields)`` records an event."""
        self._mandate, self._promises, self._peers, self._event = mandate, promises, peers, event
        self._node, self._nproc = node, nproc
        self.round = max(mandate.roster.round, promises.seen) + 1
        """The round that is gathered or runs."""
        self.stage: Stage = "gather"
        self.gathering_since = now
        self.restarts, self.requeues = mandate.roster.restarts, mandate.roster.requeues
        self.world, self.failures = World(), FailureHistory(strikes)
        self.hangs = HangWatch(rhythm)
        self._announced = float("inf")
        """The timeout of a hang that was recorded last."""
        self._next_look = 0.0
        self._paces: SlowWatch | None = None
        self._next_pace = 0.0
        self.verdict: Verdict | None = None
        self.abdicated = ""
        """Why the leader stopped without a verdict: the last loss of a node, else the lack of a majority."""
        self.first = mandate.granted
        """No round has been formed in this allocation yet."""
        self.predecessor_lost = "" if self.first else reason
        """Why the earlier leader was lost, until its round has ended."""
        self._last_loss = ""
        """The last loss of a node in this round, or since the previous round."""

    # what the leader has received

    def on_status(self, status: Status, now: float, *, is_news: bool) -> None:
        """``is_news``: a field of ``status`` that decisions depend on has changed."""
        if self.stage == "run":
            failure = self.world.on_status(status, self.failures, now, round=self.round, is_news=is_news)
            if failure:
                self._event("failure", round=self.round, **failure)

    def on_roster(self, roster: Roster) -> bool:
        """An agent holds ``roster``. True if the leader adopts it, as it has yet to take over, and its own roster is
        older.
        """
        if self._mandate.granted or self.stage != "gather" or not self._mandate.on_roster(roster):
            return False
        self._promises.accept(roster)
        self._peers.barred |= dict.fromkeys(roster.barred, BARRED)
        self._peers.add_known(roster.hosts)
        self.restarts, self.requeues = max(self.restarts, roster.restarts), roster.requeues
        self.round = max(self.round, roster.round + 1)
        return True

    def on_seen(self, round: int, now: float) -> None:
        """An agent that has connected has received an order of ``round``, perhaps from another leader, which may have
        formed that round from the nodes connected to it.
        """
        if self.stage == "gather" and round >= self.round:
            self.round, self.gathering_since = round + 1, now

    def on_lost(self, node: int, reason: str) -> None:
        """The agent of ``node`` is lost, or its workers cannot be killed."""
        self._last_loss = reason
        self.world.on_lost(node, reason)

    def is_idle(self, status: Status) -> bool:
        """Whether no worker is alive, and the agent knows of this round."""
        return status.state == "idle" and (self.stage == "run" or status.round == self.round)

    def is_being_stopped(self, node: int) -> bool:
        """Whether ``node`` belongs to the world that is taken over: the leader waits until its workers are stopped."""
        return bool(self.predecessor_lost) and node in self._mandate.roster.members

    def view(self, now: float) -> RoundView:
        return self.world.view(self.predecessor_lost, now)

    @property
    def are_over(self) -> bool:
        """Whether there will be no further round under this leader."""
        return bool(self.verdict or self.abdicated)

    @property
    def progress(self) -> Reached:
        """How far the job is."""
        nodes = len(self.world.formed)
        return Reached(self.round, nodes, nodes * self._nproc, self.restarts, self.world.step)

    # what was decided

    def form(self, nodes: tuple[int, ...], port: int, now: float) -> None:
        """Start the round with ``nodes``, in rank order. Its store listens on ``port`` of this node."""
        peers = self._peers.by_node
        rank0 = peers[nodes[0]]
        addr = rank0.status.host.addresses[0] if rank0.addr.startswith("127.") else rank0.addr
        size = len(nodes)
        plans = {node: Plan(rank, size, self.restarts, port, addr) for rank, node in enumerate(nodes)}
        self._record_absent()
        self.stage, self.first, self._last_loss = "run", False, ""
        self.hangs.begin()
        if self._paces:
            self._paces.begin(nodes)
        self.world = World(nodes, plans, now)
        base = Base(self.round, self._node, tuple(node for node in nodes if peers[node].status.votes))
        # including lost nodes: the next leader starts new agents there, or excludes them at a requeue
        known = [*(peer.status.host for peer in peers.values() if peer.joined), *self._peers.missing]
        hosts = distinct(sorted(known, key=lambda host: host.node))
        mark = f"{self.round}.{self._node}.{now:.6f}"  # a leader never forms two rounds within a microsecond
        barred = tuple(self._peers.barred)
        self._mandate.on_form(Roster(self.round, hosts, (base,), self.restarts, self.requeues, nodes, mark, barred))
        self._promises.accept(self._mandate.roster)  # before it is sent to any agent
        self._event(
            "round",
            round=self.round,
            nodes=[peers[node].status.name for node in nodes],
            world_size=size * self._nproc,
            restarts=self.restarts,
            leader=peers[self._node].status.name if self._node in peers else None,
        )

    def drain(self, decision: Decision, now: float) -> None:
        """Have the workers save and stop."""
        self.world.change, self.world.changed_at = decision, now
        self._event("drain", round=self.round, reason=decision.reason)

    def gather(self, decision: Decision, now: float) -> None:
        """Stop the running round, or end the round of the earlier leader, and gather the next round."""
        self._close(now)
        if self.predecessor_lost:  # this round has a new number already
            self.predecessor_lost = ""
        else:
            self._open(now)
        self.restarts += decision.charged
        self._event("restart", round=self.round, restarts=self.restarts, reason=decision.reason)

    def bar(self, reason: str) -> None:
        """The node with the failure stays out from now on."""
        failure = self.world.failure
        assert failure
        self._peers.barred[failure.node] = BARRED
        self._event("barred", node=failure.node, reason=reason, **self.failures.strike(failure))

    def end(self, decision: Decision, now: float) -> None:
        """End this run of the job, with a verdict."""
        outcome, ended = _OUTCOMES[decision.action], self.round
        if self.first and decision.cause == "node lost" and (absent := self._peers.absent_names):
            decision = replace(decision, reason=f"{decision.reason}; never joined: {absent}")
            self._record_absent()
        self._close(now)
        failure = None if outcome == "finished" else self.failures.last_failure
        if outcome == "requeue":
            self.requeues += decision.charged
        if outcome != "finished":
            self._open(now)  # the workers are stopped
        counters = (self.restarts, self.requeues, ended)
        self.verdict = Verdict(outcome, decision.cause, decision.reason, failure, *counters)
        self._event("verdict", **asdict(self.verdict))

    def abdicate(self, reason: str) -> None:
        """Stop leading, without a verdict: others may lead by now."""
        self.abdicated = self._last_loss or reason
        if self._mandate.ever_granted:
            self._event("abdicate", round=self.round, reason=reason)

    def record_progress(self, now: float, *, over: bool = False) -> None:
        """Record how the workers have started and how far they are, if that is due. ``over``: the round ends."""
        workers = len(self.world.formed) * self._nproc
        for name, fields in self.world.due_records(workers, now, over=over):
            self._event(name, round=self.round, **fields)

    def look_for_hang(self, now: float, wall: float, *, held: bool) -> None:
        """See whether the workers of the round hang: a failure of the node that has been silent for longest. Call this
        with each tick, while the round is not requested to end. ``held``: as in ``HangWatch.look``.
        """
        world, peers = self.world, self._peers.by_node
        if self.stage != "run" or world.failure or world.lost or world.change or now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY
        known = {node: peers[node].status for node in world.formed if node in peers}
        running = {node: status for node, status in known.items() if status.state == "running"}
        here = [status for status in known.values() if status.round == self.round]
        if len(here) < len(world.formed) or len(running) + len(world.succeeded) < len(here):
            return
        signs = {node: status.signs for node, status in running.items()}
        step = max((status.step for status in running.values()), default=-1)
        hang = self.hangs.look(signs, step, whole=not world.succeeded, live=world.live, held=held)
        familiar = self.hangs.is_familiar or not self.hangs.rhythm.reports
        limit, why = timeout(self.hangs.rhythm, live=world.live, sure=familiar)
        is_news = limit != float("inf") and not 1 / _NEWS < limit / self._announced < _NEWS
        if is_news and (familiar or self._announced == float("inf")):
            self._announced = limit
            self._event("hang_timeout", seconds=limit, reason=why)
        if not hang:
            return
        rank = world.formed.index(hang.node) * self._nproc
        failure = Failure("hang", known[hang.node].name, rank, 0, 0, hang.message, wall)
        self._event("failure", round=self.round, **world.on_hang(failure, hang.node, self.failures, now))

    def look_for_slow(self, factor: float, now: float) -> Comparison:
        """See which nodes are slow. Call this with each tick. ``factor``: as ``Policy.slow_factor``."""
        world, peers = self.world, self._peers.by_node
        calm = not (world.failure or world.lost or world.change or world.succeeded)
        if self.stage != "run" or not calm or now < self._next_pace:
            return NO_DIFFERENCE
        self._next_pace = now + _LOOK_EVERY
        self._paces = self._paces or SlowWatch(factor)
        here = [peers[node].status for node in world.formed if node in peers]
        if len(here) < len(world.formed) or any(status.round != self.round for status in here):
            return NO_DIFFERENCE
        seen = self._paces.look({status.node: status.pace for status in here})
        for slow in seen.begun:
            name = peers[slow.node].status.name
            fields = {"seconds": slow.seconds, "others": slow.others, "times": slow.times}
            self._event("slow", round=self.round, node=name, **fields, reason=slow.reason)
        for node in seen.ended:
            self._event("slow_over", round=self.round, node=peers[node].status.name)
        return seen

    def _record_absent(self) -> None:
        """The job continues without the granted nodes that never connected, and avoids them after a requeue."""
        for name in self._peers.absent if self.first else ():
            self._event("absent", node=name, reason=NEVER_JOINED)

    def _close(self, now: float) -> None:
        self.failures.on_end(self.world.failure)
        self.record_progress(now, over=True)

    def _open(self, now: float) -> None:
        self.round = max(self.round, self._peers.highest_round, self._promises.seen) + 1
        self.stage, self.world, self.gathering_since = "gather", World(), now
