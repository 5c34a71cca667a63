"""Some agents of one job in this process: real control threads, real sockets on loopback, a real run directory, but no
workers, stores or Slurm.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated

from elastic_hpc.agent.bridge import Control, Seat
from elastic_hpc.errors import JobEnded
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.policy import Verdict
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Network
from elastic_hpc.network.identity import Identity
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.record.endpoint import Published, read_published
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.training import Progress

POLICY = replace(
    simulated.POLICY,
    min_nodes=1,
    max_nodes=3,
    grow=False,
    max_restarts=3,
    max_requeues=1,
    heartbeat_timeout=2.0,
    join_timeout=20.0,
    last_call_timeout=5.0,
    grace=5.0,
    can_requeue=False,
)


def wait_for(look: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def end_of(control: Control, round: int) -> JobEnded:
    """Take part in the end of the job: stop the workers of ``round`` on the leader's order. Returns the outcome."""
    with pytest.raises(JobEnded) as ended:  # noqa: PT012 - it ends at the one call or at the other
        wait_for(lambda: control.must_stop(round))
        control.next_seat()
    return ended.value


class Node:
    """One agent: its control, and a stand-in for the rest of the agent."""

    def __init__(self, cluster: Cluster, index: int, *, first: bool) -> None:
        self.cluster = cluster
        self.listener = addresses.listen_from(42000)
        self.host = Host(index, f"n{index}", ("127.0.0.1",), self.listener.getsockname()[1])
        self.identity = Identity("job", 0, index, self.host.name, secrets.token_hex(8))
        self.recorder: Recorder | None = None
        self.leader: Leader | None = None
        self.beats = 0
        self.gave_up: list[float] = []
        policy = cluster.policy
        self.control = Control(
            self.host,
            1,
            self._network(),
            self,
            Promises(votes=votes(index)),
            heartbeat_timeout=policy.heartbeat_timeout,
            join_timeout=policy.join_timeout,
            first=first,
            beat=self._beat,
        )
        self.control.start()

    def _beat(self) -> None:
        self.beats += 1

    def _network(self) -> Network:
        async def secret() -> bytes:
            return self.cluster.rundir.read_secret()

        self.network = Network([self.listener], self.identity, secret, self.cluster.policy.heartbeat_timeout / 5)
        return self.network

    def find_leader(self) -> Published | None:
        return read_published(self.cluster.rundir)

    def give_up(
        self, _roster: Roster | None, waited: float, why: str, *, patient: bool, **_: object
    ) -> JobEnded | None:
        self.gave_up.append(waited)
        return None if patient else JobEnded("lost", f"no leader: {why}")

    def lead(self, promises: Promises, reason: str) -> LeaderServer:
        self.recorder = self.recorder or Recorder(self.cluster.rundir, 0, self.host, "job")
        self.leader = Leader(
            self.cluster.policy,
            node=self.host.node,
            nproc=1,
            now=time.monotonic(),
            granted=0 if promises.roster else self.cluster.granted,
            promises=promises,
            reason=reason,
        )
        return LeaderServer(self.leader, self.recorder, self._open_store, self._act)

    async def _open_store(self, round: int) -> int:
        return 1000 + round

    async def _act(self, verdict: Verdict, lost: list[str], *, alone: bool, **_: object) -> None:
        self.cluster.acted.append((verdict, lost, alone))

    def train(self, round: int) -> None:
        """Report that its workers have done a step of ``round``."""
        self.control.report("running", round)
        self.control.report_progress(Progress(1, drained=False))

    def in_loop(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` on the control thread and return its result."""

        async def run() -> Any:
            return work()

        assert self.control._loop
        return asyncio.run_coroutine_threadsafe(run(), self.control._loop).result(timeout=10)

    def close(self) -> None:
        """End the agent; from then on nothing answers at its address."""
        self.in_loop(self.network.close)
        self.control.close(timeout=10)
        self.listener.close()
        if self.recorder:
            self.recorder.close()

    def die(self) -> None:
        self.cluster.nodes.remove(self)
        self.close()


class Cluster:
    """``granted`` agents; the first one leads."""

    def __init__(self, path: Path, granted: int = 3, **changes: Any) -> None:
        self.policy = replace(POLICY, **changes)
        self.granted = granted
        self.rundir = RunDir(path / "run").create()
        self.secret = self.rundir.make_secret()
        self.acted: list[tuple[Verdict, list[str], bool]] = []
        self.nodes: list[Node] = []
        for index in range(granted):
            self.nodes.append(Node(self, index, first=index == 0))

    @property
    def controls(self) -> list[Control]:
        return [node.control for node in self.nodes]

    @property
    def port(self) -> int:
        """The leader's address."""
        return next(node.host.port for node in self.nodes if node.leader)

    def seats(self, nodes: Sequence[Node] = ()) -> list[Seat]:
        """The places of all agents in the next round. Each agent waits on a thread of its own, as in production."""
        controls = [node.control for node in nodes or self.nodes]
        with ThreadPoolExecutor(len(controls)) as threads:
            return list(threads.map(Control.next_seat, controls))

    def wait_stop(self, round: int) -> None:
        """Wait until all agents have received the order to end ``round``. An agent without this order would get its old
        place from ``seats``, because here, unlike in production, its workers have never started.
        """
        for control in self.controls:
            wait_for(lambda control=control: control.must_stop(round))

    def connect(self) -> socket.socket:
        """A new connection to the leader, over which nothing was sent yet."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.rundir.events() if event["event"] == name]

    def close(self) -> None:
        for node in self.nodes:
            leader = node.control._membership._own_leader.server
            if leader:
                node.in_loop(lambda leader=leader: leader.on_request("stop", "test"))
        for node in reversed(self.nodes):
            node.close()
