"""A leader and its agents under a simulated network that delays, reorders, drops and doubles, with a simulated clock.

The agents decide with ``elastic_hpc.member`` and the leader with ``elastic_hpc.leader``, as the real ones do; only
sockets, threads and processes are replaced.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from elastic_hpc import member
from elastic_hpc.decide import Policy
from elastic_hpc.leader import Leader
from elastic_hpc.protocol import Failure, Order, Plan, Status

BEAT = 1.0


@dataclass
class Agent:
    node: int
    conn: int = 0
    status: Status = None  # type: ignore[assignment]
    order: Order | None = None
    workers: int = 0
    """Round whose workers are alive or have just ended."""
    alive: bool = False
    """Whether processes of that round are alive."""
    busy: bool = False
    left: str = ""
    started: list[tuple[int, Plan]] = field(default_factory=list)


class Simulation:
    """``loss``: share of messages that are dropped, and of those that are doubled, while faults are injected."""

    def __init__(self, seed: int, *, nodes: int, policy: Policy, loss: float = 0.1) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.loss = loss
        self.policy = policy
        self.leader = Leader(policy, granted=nodes, nproc=1, now=0.0)
        self.agents = [Agent(node, status=Status(0, node, f"n{node}", 1)) for node in range(nodes)]
        self.events: list[tuple[str, dict[str, object]]] = []
        self.frozen_until = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = self._conns = 0
        for agent in self.agents:
            self.after(self.random.uniform(0, 5), lambda agent=agent: self.connect(agent))
        self._every(BEAT / 2, self._tick)
        self._every(BEAT, lambda: [self._send_status(agent) for agent in self.agents])

    # clock

    def after(self, delay: float, act: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, act))  # type: ignore[arg-type]

    def _every(self, period: float, act: Callable[[], object]) -> None:
        def again() -> None:
            act()
            self.after(period, again)

        self.after(self.random.uniform(0, period), again)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; True as soon as ``until`` holds."""
        end = self.now + seconds
        while self._queue[0][0] <= end:
            self.now, _, act = heapq.heappop(self._queue)
            act()
            self._settle_leader()
            if until():
                return True
        self.now = end
        return False

    # leader

    def _tick(self) -> None:
        if self.now >= self.frozen_until:
            self.leader.on_tick(self.now)
            self._deliver_orders(beat=True)

    def _settle_leader(self) -> None:
        if self.now < self.frozen_until:
            return
        wanted = self.leader.wanted_store
        if wanted is not None:
            self.after(self.random.uniform(0, 0.2), lambda: self.leader.on_store(wanted, 1000 + wanted, self.now))
        if self.leader.verdict:
            self.leader.on_saved()
        for name, fields in self.leader.take_events():
            self.events.append((name, fields))
            if name == "round":
                self._check_new_round(fields)
        for conn in self.leader.take_dropped():
            self.after(self._latency(), lambda conn=conn: self._on_closed(conn))
        self._deliver_orders(beat=False)

    def _deliver_orders(self, *, beat: bool) -> None:
        for conn, order in self.leader.take_orders(beat=beat).items():
            for _ in range(self._copies()):
                self.after(self._latency(), lambda conn=conn, order=order: self._on_order(conn, order))

    def _check_new_round(self, fields: dict[str, object]) -> None:
        nodes = [int(str(name)[1:]) for name in fields["nodes"]]  # type: ignore[attr-defined]
        assert self.policy.min_nodes <= len(nodes) <= self.policy.max_nodes
        assert nodes == sorted(set(nodes)), "group ranks follow Slurm's node order"
        assert self.leader.restarts <= self.policy.max_restarts
        for node in nodes:
            assert not self.agents[node].alive, f"workers of node {node} still run when a new round is formed"

    # network

    def _latency(self) -> float:
        return self.random.choice((0.001, 0.01, self.random.uniform(0, 1.5)))

    def _copies(self) -> int:
        dice = self.random.random()
        return 0 if dice < self.loss else 2 if dice < 2 * self.loss else 1

    def connect(self, agent: Agent) -> None:
        if agent.conn == 0 and not agent.left:
            self._conns += 1
            agent.conn = self._conns
            agent.order = None
            self._send_status(agent)

    def disconnect(self, agent: Agent) -> None:
        """The connection breaks; either side learns of it in its own time."""
        conn = agent.conn
        if conn:
            self.after(self._latency(), lambda: self._on_closed(conn))
            self.after(self._latency(), lambda: self._leader_lost(conn))

    def _leader_lost(self, conn: int) -> None:
        if self.now < self.frozen_until:
            self.after(self.frozen_until - self.now + 0.01, lambda: self._leader_lost(conn))
        else:
            self.leader.on_lost(conn, "its connection was closed", self.now)

    def _send_status(self, agent: Agent) -> None:
        if not agent.conn:
            return
        agent.status = replace(agent.status, seq=agent.status.seq + 1)
        for _ in range(self._copies()):
            self.after(self._latency(), lambda conn=agent.conn, status=agent.status: self._on_status(conn, status))

    def _on_status(self, conn: int, status: Status) -> None:
        if self.now < self.frozen_until:
            self.after(self.frozen_until - self.now + 0.01, lambda: self._on_status(conn, status))
        elif any(agent.conn == conn for agent in self.agents):  # else the connection is closed
            self.leader.on_status(conn, f"10.0.0.{status.node}", status, self.now)

    def _on_order(self, conn: int, order: Order) -> None:
        for agent in self.agents:
            if agent.conn == conn and (agent.order is None or order.seq > agent.order.seq):
                agent.order = order
                self._act(agent)

    def _on_closed(self, conn: int) -> None:
        for agent in self.agents:
            if agent.conn == conn:
                agent.conn, agent.order = 0, None
                self._act(agent)
                self.after(self.random.uniform(0.05, 2), lambda agent=agent: self.connect(agent))

    # an agent's main thread

    def _act(self, agent: Agent) -> None:
        if agent.busy or agent.left:
            return
        match member.step(agent.order, agent.status, agent.workers):
            case member.Leave(outcome, _):
                agent.left, agent.conn, agent.alive = outcome, 0, False
            case member.Stop():
                agent.busy = True
                self.after(self.random.uniform(0, 1), lambda: self._stopped(agent))
            case member.Acknowledge(round):
                self._report(agent, state="idle", round=round, failure=None)
            case member.Start(round, plan):
                assert not agent.alive
                agent.started.append((round, plan))
                agent.workers, agent.alive = round, True
                self._report(agent, state="running", round=round)

    def _stopped(self, agent: Agent) -> None:
        agent.workers, agent.alive, agent.busy = 0, False, False
        self._act(agent)

    def _report(self, agent: Agent, **changes: object) -> None:
        agent.status = replace(agent.status, **changes)  # type: ignore[arg-type]
        self._send_status(agent)
        self._act(agent)

    # faults

    def end_workers(self, agent: Agent, *, failed: bool) -> None:
        """Its workers end: they crash, or they finish."""
        if agent.alive and not agent.busy:
            agent.alive = False
            failure = Failure("exit", f"n{agent.node}", agent.node, 0, 1, "exit code 1", self.now)
            self._report(
                agent,
                state="failed" if failed else "succeeded",
                round=agent.workers,
                failure=failure if failed else None,
            )

    def freeze_leader(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.now + seconds)

    def lose(self, agent: Agent) -> None:
        """Power loss: nothing is said, nothing is closed."""
        agent.left, agent.conn, agent.alive, agent.order = "dead", 0, False, None
