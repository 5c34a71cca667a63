"""Whole jobs in simulated time: the real membership, server and leader of several nodes, on an event loop with a
jumping clock, a network with faults (``simulated_network``), and a simulated Slurm (``simulated_slurm``).

Only sockets, threads, files and processes are replaced. At each start of workers the simulation asserts the invariants:
no round is formed twice, two worlds never train at the same time, and an older world never trains after a newer one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from simulated_network import SimLink, SimNetwork, VirtualLoop
from simulated_slurm import Queue, SimSource

from elastic_hpc.agent.lookout import Lookout, Outlook
from elastic_hpc.agent.supply import Supply
from elastic_hpc.errors import JobEnded
from elastic_hpc.membership import follower, messages
from elastic_hpc.membership.hangs import NO_RHYTHM, NO_SIGNS, Rhythm, Signs
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.leaderless import LEADERLESS, Conclude, GiveUp, without_leader
from elastic_hpc.membership.messages import Failure, Order, Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.policy import Policy, Verdict
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.slow import NO_PACE, Pace
from elastic_hpc.membership.wishes import Bounds
from elastic_hpc.network.identity import Identity, RunIsOver
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.network.session import Membership
from elastic_hpc.record.endpoint import Published

TIMEOUT = 5.0
POLICY = Policy(
    min_nodes=2,
    max_nodes=4,
    sizes=(),
    spares=0,
    grow=True,
    free_growth=False,
    grow_every=0.0,
    wait_for_nodes=60.0,
    max_restarts=1000,
    max_requeues=2,
    heartbeat_timeout=TIMEOUT,
    join_timeout=60.0,
    last_call_timeout=10.0,
    grace=30.0,
    can_requeue=True,
)


class SimRecord:
    """The leader's record, in the job's shared folder."""

    def __init__(self, job: Job, node: SimNode) -> None:
        self.job, self.node = job, node

    @property
    def warning(self) -> str:
        return self.job.warning

    def publish(self, agents: Iterable[Host]) -> None:
        if not self.job.full:
            assert self.node.run == self.job.run_number, "a leader of an earlier run takes the place of the present one"
            self.job.published = Published.of(self.node.run, self.node.host, agents)

    def beat(self) -> None:
        if self.job.stalls:
            return
        self.job.beats += 1
        if self.job.verdict and self.job.verdict.get("actor") == LEADERLESS:  # as RunDir.withdraw does
            self.job.verdict, self.job.requeued = None, False
            self.job.acted.clear()

    def event(self, name: str, fields: dict[str, Any]) -> None:
        if self.node.dead:
            return
        self.job.events.append((self.job.now, self.node.index, name, fields))
        if name == "round":
            policy = self.job.policy.within(self.node.promises.wishes.bounds, None)
            assert policy.min_nodes <= len(fields["nodes"]) <= policy.max_nodes
            nodes = [int(name[1:]) for name in fields["nodes"]]
            assert nodes == sorted(nodes), "group ranks follow Slurm's node order"
            assert fields["restarts"] <= self.job.policy.max_restarts

    @property
    def stalls(self) -> bool:
        return self.job.stalls

    def state(self, *, bounds: Bounds | None, rhythm: Rhythm, **state: int) -> None:
        self.job.bounds, self.job.rhythm = bounds, rhythm

    def verdict(self, verdict: dict[str, Any]) -> Future[None]:
        assert self.job.verdict is None, "two verdicts"
        self.job.verdict = verdict
        done: Future[None] = Future()
        done.set_result(None)
        return done


@dataclass
class Workers:
    """The processes of one node."""

    round: int = 0
    alive: bool = False
    """Whether the workers run; otherwise they have ended without being stopped."""


class SimNode:
    """A node: the agent's main thread, and the interface that Membership needs."""

    def __init__(self, job: Job, index: int, port: int, *, first: bool = False) -> None:
        self.job, self.index, self.first = job, index, first
        self.host = Host(index, f"n{index}", (*job.bridges, f"10.0.0.{index}"), port)
        self.run = job.run_number
        self.identity = Identity("sim", self.run, index, self.host.name, str(next(job.boots)))
        self.network = SimNetwork(job, self)
        self.attend: Callable[[Any], Awaitable[None]] | None = None
        self.dead = ""
        """How the node was lost: ``power``: silently; ``killed``: its connections are closed."""
        self.frozen = False
        self.left = ""
        self.workers = Workers()
        self.started: list[tuple[int, messages.Plan]] = []
        self._place = (self.run, index)
        kept = job.memories.get(self._place, b"")
        lost = self._place in job.memories and not kept
        self._is_second = any(
            (other.run, other.index) == self._place and other.host.port != port and not other.dead
            for other in job.nodes
        )
        if self._is_second:  # the second agent cannot read the first one's memory: otherwise it would not have started
            kept, lost = b"", True
        self.promises = Promises(self._keep, kept, votes=votes(index) and not lost)
        self.membership: Membership
        self._status = Status(0, self.host, 1)
        self.order: Order | None = None
        self.links: list[SimLink] = []
        self._busy = False
        self._beats = (-1, 0.0)
        self._tasks: set[asyncio.Task[None]] = set()

    def _keep(self, promises: bytes) -> None:
        if not (self.dead or self._is_second):
            self.job.memories[self._place] = promises

    def spawn(self, work: Awaitable[Any]) -> None:
        async def guarded() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                try:
                    await work
                except Exception as error:
                    self.job.bugs.append(error)
                    raise

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)

    def start(self) -> None:
        self.membership = Membership(
            self.host,
            self,
            self.network,
            self.promises,
            heartbeat_timeout=TIMEOUT,
            join_timeout=self.job.policy.join_timeout,
            first=self.first,
        )
        self.spawn(self.membership.run())

    # needed by Membership

    def status(self) -> Status:
        if not self.workers.alive:
            return self._status
        signs = self.job.signs(self)
        return replace(self._status, step=self._status.step + signs.reports, signs=signs, pace=self.job.pace(self))

    def set_order(self, order: Order | None, link: Any) -> None:
        self.order = order
        if order and order.drain and order.round == self.workers.round and self.job.scripts_listen:
            asyncio.get_running_loop().call_later(self.job.random.uniform(0, 1), self._drained, order.round)
        self._act()

    def ended(self, over: JobEnded) -> None:
        self.leave(over.outcome)

    async def published(self) -> Published | None:
        await asyncio.sleep(0.01)
        if not self.job.files:
            return None
        self._check_run()
        published = self.job.published
        return published if published and published.run == self.run else None

    def _check_run(self) -> None:
        if self.job.published and self.job.published.run > self.run:
            raise RunIsOver(self.run, self.job.published.run)

    async def give_up(
        self, roster: Roster | None, waited: float, why: str, *, patient: bool, others: Sequence[str]
    ) -> JobEnded | None:
        if self.job.files:
            self._check_run()
        step = without_leader(
            waited,
            why,
            joins=not votes(self.index),
            ever_led=roster is not None,
            patient=patient,
            heartbeat_timeout=TIMEOUT,
            read_verdict=lambda: self.job.verdict,
            somebody_leads=self._somebody_leads,
            somebody_acts=lambda: self.job.files and bool(self.job.acted),
        )
        match step:
            case GiveUp(outcome, reason):
                return JobEnded(outcome, reason)
            case Conclude(verdict):
                own = {"outcome": "requeue", "reason": "no leader", "cause": "node lost", "actor": LEADERLESS}
                self.job.verdict = verdict or own
                self.job.requeued = True
                self.job.acted.append((self.index, list(others)))
                return JobEnded("lost", "no leader")
        return None

    def _somebody_leads(self) -> bool:
        if self._beats[0] != self.job.beats:
            self._beats = (self.job.beats, self.job.now)
        return self.job.now - self._beats[1] < 2 * TIMEOUT

    def lead(self, promises: Promises, reason: str) -> LeaderServer:
        leader = Leader(
            self.job.policy,
            node=self.index,
            nproc=1,
            now=self.job.now,
            granted=0 if promises.roster else self.job.size,
            round=0 if promises.roster else self.job.trained,
            promises=promises,
            reason=reason,
            supplied=True,
            rhythm=NO_RHYTHM if promises.roster else self.job.rhythm,
        )
        record = SimRecord(self.job, self)
        supply = Supply(SimSource(self.job, self), record.event, grow=self.job.policy.grow)
        lookout = Lookout(self.job.outlooks(record), record.event)
        return LeaderServer(leader, record, self._open_store, self._act_on, supply, lookout)

    async def _open_store(self, round: int) -> int:
        await asyncio.sleep(self.job.random.uniform(0, 0.2))
        return next(self.job.ports)

    async def _act_on(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None:
        pass

    # the main thread

    def _act(self) -> None:
        if self._busy or self.left or self.dead or self.frozen:
            return
        match follower.step(self.order, self._status, self.workers.round):
            case follower.End(outcome):
                self.leave(outcome)
            case follower.Stop():
                self._busy = True
                asyncio.get_running_loop().call_later(self.job.random.uniform(0, 1), self._stopped)
            case follower.Acknowledge(round):
                self._report(state="idle", round=round, failure=None, drained=False)
            case follower.Start(round, plan):
                self.workers = Workers(round, alive=True)
                self.started.append((round, plan))
                self._report(
                    state="running",
                    round=round,
                    listens=self.job.scripts_listen,
                    step=round if self.job.scripts_progress else -1,
                )
                self.job.check()

    def _stopped(self) -> None:
        if not self.dead:
            self.workers, self._busy = Workers(), False
            self._act()

    def _report(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        self.membership.send_status()
        self._act()

    def leave(self, outcome: str) -> None:
        self.left, self.workers = outcome, Workers()
        self.membership.leave()
        self.job.queue.ended(self)
        if self.job.verdict and not any(votes(node.index) for node in self.job.left):
            for id in list(self.job.queue.jobs):  # see elastic_hpc.agent.conclude
                self.job.queue.cancel(id)

    def warn(self) -> None:
        """The Slurm job of this joiner is about to end."""
        self._report(leaving="preempted")

    def warned(self, reason: str) -> None:
        """The same, but the batch script notifies the leader (``agent.warned``)."""
        for node in self.job.left:
            if server := node.membership._own_leader.server:
                server.on_request(messages.Leave(self.index, reason))

    def _drained(self, round: int) -> None:
        if round == self.workers.round:
            self.end_workers(failed=False, drained=True)

    # faults

    def end_workers(
        self,
        *,
        failed: bool,
        drained: bool = False,
        kind: str = "signal",
        message: str = "exit code 1",
        step: int = -1,
    ) -> None:
        """The workers crash or finish."""
        if self.workers.alive and not self._busy and not self.dead and not self.frozen:
            self.workers.alive = False
            failure = Failure(kind, self.host.name, self.index, 0, -9, message, self.job.now)
            self._report(
                state="failed" if failed else "succeeded",
                round=self.workers.round,
                failure=failure if failed else None,
                drained=drained,
                step=step,
            )

    def power_off(self) -> None:
        self._die("power")

    def kill(self) -> None:
        """The agent dies, and its guard kills its workers."""
        self._die("killed")

    def freeze(self, seconds: float) -> None:
        """The agent freezes; its workers continue."""
        if self.dead or self.frozen or self.left:
            return
        self.frozen = True

        def thaw() -> None:
            self.frozen = False
            self._act()

        asyncio.get_running_loop().call_later(seconds, thaw)

    def _die(self, how: str) -> None:
        if self.dead or self.left:
            return
        if how == "killed":
            for link in self.links:
                link.close()
        self.dead, self.workers = how, Workers()
        for task in self._tasks:
            task.cancel()
        self.job.queue.ended(self)


@dataclass
class Job:
    """``loss``: the share of messages that are dropped, and the share that are doubled, while faults are injected."""

    seed: int
    size: int
    policy: Policy
    loss: float = 0.1
    files: bool = True
    """Whether the file system of the shared folder answers."""
    events: list[tuple[float, int, str, dict[str, Any]]] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    requeued: bool = False
    acted: list[tuple[int, list[str]]] = field(default_factory=list)
    """The nodes without a leader that have requeued the job, each with the nodes to which it was connected."""
    full: bool = False
    """Whether the shared folder cannot be written."""
    published: Published | None = None
    bridges: tuple[str, ...] = ()
    """Addresses that each node publishes in addition to its own."""
    bounds: Bounds | None = None
    """``bounds`` and ``rhythm`` have the same content as in ``state.json``."""
    rhythm: Rhythm = NO_RHYTHM
    signs: Callable[[SimNode], Signs] = lambda _node: NO_SIGNS
    """``signs`` and ``pace`` give the counts of a node's agent while its workers run."""
    pace: Callable[[SimNode], Pace] = lambda _node: NO_PACE
    stalls: bool = False
    """Whether the file system of the record stalls."""
    run_number: int = 0
    """The current run."""
    warning: str = ""
    beats: int = 0
    scripts_listen: bool = False
    scripts_progress: bool = True
    outlooks: Callable[[SimRecord], list[Outlook]] = lambda _record: []
    """The sources that each leader checks regularly."""
    bugs: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.ports = itertools.count(1000)
        self.memories: dict[tuple[int, int], bytes] = {}
        """The promises that the agents of each run and node have kept; empty after a reboot of the node."""
        self.boots = itertools.count()
        self.nodes: list[SimNode] = []
        self.at: dict[int, SimNode] = {}
        """Nodes by port. The agent of a node listens on the port of its index, further agents of that node on other
        ports.
        """
        for index in range(self.size):
            self.add(index, first=index == 0)
        self.queue = Queue(self)
        self.cuts: set[frozenset[int]] = set()
        self.one_way: set[tuple[int, int]] = set()
        """Pairs of ports, of which the first cannot send to the second."""
        self.trained = 0
        self._formed: dict[int, int] = {}

    def add(self, index: int, port: int | None = None, *, first: bool = False) -> SimNode:
        """Add a node, or a new agent on a node whose agent has died; it finds that agent's promises. On another
        ``port`` it is a second agent of the node.
        """
        port = index if port is None else port
        node = self.at[port] = SimNode(self, index, port, first=first)
        self.nodes = [*(other for other in self.nodes if other.host.port != port), node]
        return node

    def requeue(self) -> None:
        """Slurm restarts the job: from now on new agents belong to the next run. Agents
        that are cut off keep running.
        """
        self.run_number += 1
        self.verdict = None

    @property
    def joiners(self) -> list[SimNode]:
        return [node for node in self.nodes if not votes(node.index)]

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def left(self) -> list[SimNode]:
        return [node for node in self.nodes if not node.left and not node.dead]

    def latency(self) -> float:
        return self.random.choice((0.001, 0.01, self.random.uniform(0, 0.3 if not self.loss else 1.5)))

    def connected(self, one: SimNode, other: SimNode) -> bool:
        ports = (one.host.port, other.host.port)
        return frozenset(ports) not in self.cuts and ports not in self.one_way

    def cut(self, nodes: Sequence[int]) -> None:
        """Let no message pass between ``nodes``, by port, and the other nodes."""
        rest = set(self.at) - set(nodes)
        self.cuts = {frozenset((a, b)) for a in nodes for b in rest}

    def heal(self) -> None:
        self.cuts, self.one_way = set(), set()

    def check(self) -> None:
        """No round is formed twice, and only one world trains, the newest."""
        for bug in self.bugs:
            raise bug
        training = []
        for round in {node.workers.round for node in self.nodes if node.workers.alive}:
            members = [node for node in self.nodes if node.workers.round == round and node.workers.alive]
            plans = [node.started[-1][1] for node in members]
            ports = {plan.store_port for plan in plans} | {self._formed.setdefault(round, plans[0].store_port)}
            assert len(ports) == 1, f"round {round} was formed twice"
            assert len({plan.group_rank for plan in plans}) == len(plans)
            if len(members) == plans[0].group_world_size:
                training.append(round)
        assert len(training) <= 1, f"two worlds train: rounds {training} at {self.now}"
        if training:
            assert training[0] >= self.trained, f"round {training[0]} trains after round {self.trained}"
            self.trained = training[0]

    def training(self) -> bool:
        """Whether all remaining nodes train in one world, or wait beside a full world."""
        rounds = {node.workers.round for node in self.left if node.workers.alive}
        running = [node for node in self.left if node.workers.alive]
        return len(rounds) == 1 and len(running) == min(len(self.left), self.policy.max_nodes)

    def over(self) -> bool:
        return self.verdict is not None

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until ``condition`` holds, but at most ``seconds``."""
        end = self.now + seconds
        while self.now < end:
            if condition():
                return True
            self.check()
            await asyncio.sleep(0.05)
        return condition()

    def run(self, story: Callable[[], Awaitable[None]]) -> None:
        """Start all nodes and play ``story``."""

        async def play() -> None:
            random.seed(self.seed)
            for node in self.nodes:
                asyncio.get_running_loop().call_later(self.random.uniform(0, 3) if node.index else 0, node.start)
            await story()

        loop = VirtualLoop()
        try:
            loop.run_until_complete(play())
        finally:
            while pending := asyncio.all_tasks(loop):  # loop: Python 3.11 loses some cancellations in wait_for
                for task in pending:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(pending, timeout=1))
            loop.close()
