"""The Slurm of simulated jobs: free nodes, a queue of joiners, and restarted agents."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from elastic_hpc.errors import SlurmError
from elastic_hpc.membership.nodes import joiner
from elastic_hpc.membership.roster import Host

if TYPE_CHECKING:
    from simulated import Job, SimNode


@dataclass
class SimJoiner:
    """A job that brings one node."""

    id: str
    state: str = "PENDING"
    node: str = ""
    time_limit: timedelta | None = None
    reason: str = "Resources"


class Queue:
    """Slurm: ``free`` nodes, and the joiners that wait for them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.free = 0
        self.refuses = False
        self.holds = ""
        """The reason why no joiner starts, even if nodes are free."""
        self.restarts = False
        """Whether agents can be restarted."""
        self.start_takes: Callable[[], float] = lambda: 0.0
        """Seconds until a restarted agent listens; infinite if it hangs."""
        self.steps: dict[str, SimNode | None] = {}
        """The job steps of restarted agents by the name of the node; None while the agent starts."""
        self.jobs: dict[str, SimJoiner] = {}
        self.given_back: list[str] = []
        """The job's own nodes that it has given back."""
        self._ids = itertools.count(100)

    def set_free(self, nodes: int) -> None:
        self.free = nodes
        self.schedule()

    def submit(self) -> str:
        made = SimJoiner(str(next(self._ids)))
        self.jobs[made.id] = made
        self.schedule()
        return made.id

    def schedule(self) -> None:
        for waiting in self.jobs.values():
            waiting.reason = self.holds or "Resources"
            if self.holds:
                continue
            if waiting.state == "PENDING" and self.free > 0:
                self.free -= 1
                waiting.state, waiting.node = "RUNNING", f"n{joiner(waiting.id)}"
                delay = self.job.random.uniform(0.5, 6)
                asyncio.get_running_loop().call_later(delay, self._start, waiting.id)

    def _start(self, id: str) -> None:
        if id in self.jobs:
            self.job.add(joiner(id)).start()

    def cancel(self, id: str) -> None:
        gone = self.jobs.get(id)
        if gone and gone.state == "PENDING":
            del self.jobs[id]
        elif gone and (node := self.job.at.get(joiner(id))):
            node.kill()

    def restart(self, host: Host) -> None:
        """Restart an agent in a step of its own."""
        if host.name in self.steps:
            self.job.bugs.append(AssertionError(f"a second agent on {host.name}"))
        if self.job.at[host.node].dead == "killed":
            self.steps[host.name] = None
            if (delay := self.start_takes()) < float("inf"):
                asyncio.get_running_loop().call_later(delay, self._listen, host)

    def _listen(self, host: Host) -> None:
        if host.name in self.steps and self.steps[host.name] is None:
            node = self.steps[host.name] = self.job.add(host.node)
            node.start()

    def end_step(self, name: str) -> None:
        if (node := self.steps.get(name)) and not (node.dead or node.left):
            node.kill()
        self.steps.pop(name, None)

    def take_back(self, names: Collection[str]) -> None:
        """The job gives back its own nodes. An agent that still runs there because it was cut off is killed."""
        for name in names:
            node = self.job.at[int(name[1:])]
            node.kill()
            if name not in self.given_back:
                self.given_back.append(name)
                self.set_free(self.free + 1)

    def ended(self, node: SimNode) -> None:
        """The agent of a node has left, or is dead."""
        if self.steps.get(node.host.name) is node:
            del self.steps[node.host.name]
        for id in [id for id in self.jobs if joiner(id) == node.index]:
            del self.jobs[id]
            if node.dead != "power":
                self.set_free(self.free + 1)


class SimSource:
    """The interface through which a leader's supply queries Slurm."""

    def __init__(self, job: Job, node: SimNode) -> None:
        self.job, self.node = job, node

    async def _asks(self) -> None:
        await asyncio.sleep(self.job.random.uniform(0.01, 1.0))
        if self.node.dead:
            await asyncio.Event().wait()
        if self.job.queue.refuses:
            raise SlurmError("refused")

    async def lacks_agent(self, host: Host) -> bool:
        await asyncio.sleep(self.job.latency())
        lost = self.job.at[host.node]
        return self.job.queue.restarts and lost.dead == "killed" and self.job.connected(self.node, lost)

    async def restart(self, host: Host) -> bool:
        await self._asks()
        self.job.queue.restart(host)
        return True

    async def starting(self) -> dict[str, str]:
        await self._asks()
        return {name: f"step.{name}" for name in self.job.queue.steps}

    async def give_back(self, names: Collection[str]) -> None:
        await self._asks()
        self.job.queue.take_back(names)

    async def joiners(self) -> list[SimJoiner]:
        await self._asks()
        return [replace(job) for job in self.job.queue.jobs.values()]

    async def remaining(self) -> float:
        return float("inf")

    async def submit(self, exclude: Collection[str]) -> str:
        await self._asks()
        return self.job.queue.submit()

    async def shorten(self, ids: Collection[str], seconds: float) -> None:
        await self._asks()

    async def cancel(self, ids: Collection[str]) -> None:
        await self._asks()
        for id in ids:
            if id.startswith("step."):
                self.job.queue.end_step(id.removeprefix("step."))
            self.job.queue.cancel(id)
