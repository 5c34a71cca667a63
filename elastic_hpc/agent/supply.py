"""Brings the nodes that a leader could use, beside it: what to do is decided in ``growth``, done by a ``Source``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership import growth
from elastic_hpc.membership.growth import Backoff, Growth, JoinerJob, Needs
from elastic_hpc.membership.nodes import joiner
from elastic_hpc.membership.roster import Host

log = logging.getLogger(__name__)

_START_TIMEOUT = 300.0
"""Seconds that a joiner may take from its job's start until it comes; the environment may lie on a slow file system."""

_WASTED_AT_MOST = 2
"""A node on which so many joiners have ended before they came is not asked for again."""

_FAILED = (ElasticError, OSError)

_RESTART_TIMEOUT = 60.0
"""Seconds that an agent which was started anew may take to come."""

_POLL, _POLL_AT_MOST = 0.5, 60.0
"""Seconds between two looks at the queue, and at nodes that are lost; twice as long each time that nothing has changed.
"""


class Source(Protocol):
    """Slurm (``joiners.SlurmSource``), or a simulated one. All but the first raise ElasticError."""

    async def lacks_agent(self, host: Host) -> bool:
        """Whether ``host`` answers, and has no agent: not if it has lost power, or its agent is only cut off."""

    async def restart(self, host: Host) -> bool:
        """Start an agent there. False if the node is not the job's any more."""

    async def joiners(self) -> Sequence[JoinerJob]:
        """Those that wait or run."""

    async def remaining(self) -> float:
        """Seconds until the job's time limit."""

    async def shorten(self, ids: Collection[str], seconds: float) -> None:
        """Give joiners that wait a time limit of ``seconds``."""

    async def submit(self, exclude: Collection[str]) -> str:
        """One joiner, for any node but those; the answer is its id."""

    async def cancel(self, ids: Collection[str]) -> None: ...


class _Restart:
    """The agent of one node, which is to be started anew."""

    def __init__(self) -> None:
        self.backoff = Backoff()
        self.task: asyncio.Task[None] | None = None
        self.until = 0.0
        """It has been started and may come until then."""
        self.gone = False


class Supply:
    """For one leader, until ``run`` is cancelled; ``event`` records what is done. Who acts on the verdict sees to the
    joiners that are left then (``conclude``).
    """

    def __init__(self, source: Source, event: Callable[[str, dict[str, Any]], None], *, grow: bool) -> None:
        self._source = source
        self._event = event
        self._grow = grow
        self._needs: Needs | None = None
        self._restarts: dict[int, _Restart] = {}
        self._jobs: dict[str, JoinerJob] = {}
        self._came: set[int] = set()
        self._wasted = Counter[str]()
        """How many joiners did not come, by their node."""
        self._running_since: dict[str, float] = {}
        self._looked = False
        self._growth = Growth(0, (), 0, 0)
        self._backoff = Backoff()
        self._told = ""
        self._changed = asyncio.Event()

    def need(self, needs: Needs) -> None:
        """What the leader could use now."""
        if needs != self._needs:
            self._needs = needs
            self._came |= needs.joiners
            self._changed.set()

    async def run(self, report: Callable[[Needs, int, int], None]) -> None:
        """``report`` is told how many agents are starting, and for how many nodes Slurm was asked."""
        loop = asyncio.get_running_loop()
        poll: float | None = None
        needs = self._needs
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), poll)
            self._changed.clear()
            before, needs = (needs, self._growth), self._needs
            assert needs
            restarting = await self._restart(needs.missing)
            if self._grow and (needs.nodes or self._jobs or not self._looked):
                self._growth = await self._provide(needs, restarting)
            report(needs, restarting + self._growth.starting, self._growth.pending)
            if not (needs.missing or (self._grow and (needs.nodes or self._jobs))):
                poll = None
            elif poll is None or (needs, self._growth) != before:
                poll = _POLL
            else:
                poll = min(2 * poll, _POLL_AT_MOST)
            if poll and needs.nodes and self._backoff.at:
                poll = min(poll, max(self._backoff.at - loop.time(), 1.0))

    # agents that are started anew

    async def _restart(self, missing: Collection[Host]) -> int:
        """How many are being started, and are expected."""
        now = asyncio.get_running_loop().time()
        lost = {host.node: host for host in missing}
        for node, known in self._restarts.items():
            known.until = known.until if node in lost else 0.0  # it came
        due = {node: self._restarts.setdefault(node, _Restart()) for node in lost}
        due = {node: k for node, k in due.items() if not (k.gone or k.task or now < max(k.backoff.at, k.until))}
        lacking = await asyncio.gather(*(self._source.lacks_agent(lost[node]) for node in due))
        for (node, known), lacks in zip(due.items(), lacking, strict=True):
            if lacks:
                known.task = asyncio.ensure_future(self._start(lost[node], known))
        return sum(bool(known.task) or known.until > now for node, known in self._restarts.items() if node in lost)

    async def _start(self, host: Host, known: _Restart) -> None:
        now = asyncio.get_running_loop().time()
        known.backoff.failed(now)
        try:
            known.gone = not await self._source.restart(host)
            if not known.gone:
                known.until = now + _RESTART_TIMEOUT
                self._event("agent_restart", {"node": host.name})
        except _FAILED as error:
            self._complain(f"no new agent on {host.name}: {error}")
        finally:
            known.task = None
            self._changed.set()

    # joiners

    async def _provide(self, needs: Needs, restarting: int) -> Growth:
        came = frozenset(self._came)  # as of needs: those that come meanwhile are among the nodes that it lacks
        try:
            jobs = await self._source.joiners()
            remaining = await self._source.remaining() if needs.nodes or jobs else 0.0
            self._looked = True
            self._look_for_waste(jobs, needs)
            await self._give_up_overdue(jobs)
            plan = growth.plan_growth(needs, jobs, came=came, restarting=restarting, remaining=remaining)
            if plan.cancel:
                await self._source.cancel(plan.cancel)
                self._came |= set(map(joiner, plan.cancel))
                self._event("joiners_cancelled", {"jobs": plan.cancel})
            if plan.shorten:
                await self._source.shorten(plan.shorten, remaining)
        except _FAILED as error:
            self._complain(str(error))
            return self._growth
        submitted = await self._submit(plan.submit, needs)
        return Growth(0, (), plan.starting, plan.pending + submitted)

    async def _submit(self, count: int, needs: Needs) -> int:
        """How many were accepted."""
        now = asyncio.get_running_loop().time
        useless = {node for node, times in self._wasted.items() if times >= _WASTED_AT_MOST and node}
        accepted: list[str] = []
        while len(accepted) < min(count, self._needs.nodes if self._needs else 0) and now() >= self._backoff.at:
            try:
                accepted.append(await self._source.submit(needs.names | useless))
                self._backoff.succeeded()
            except _FAILED as error:
                self._backoff.failed(now())
                self._complain(f"no joiner: {error}")
        if accepted:
            self._told = ""
            self._event("joiners", {"jobs": accepted, "wanted": needs.nodes})
            self._looked = False  # have a look at them soon
        return len(accepted)

    def _look_for_waste(self, jobs: Sequence[JoinerJob], needs: Needs) -> None:
        """Joiners that have ended and never came: their nodes are of no use, and the next ones had better wait. Not so
        where another one came from the same node, which is shared.
        """
        now = {job.id: job for job in jobs}
        for id, job in self._jobs.items():
            if id not in now and joiner(id) not in self._came and job.node not in needs.names:
                self._backoff.failed(asyncio.get_running_loop().time())
                self._wasted[job.node] += 1
                self._complain(f"joiner {id} ended{f' on {job.node}' if job.node else ''} and did not come")
        self._jobs = now

    async def _give_up_overdue(self, jobs: Sequence[JoinerJob]) -> None:
        """Joiners that have started long ago and do not come keep a node for nothing."""
        now = asyncio.get_running_loop().time()
        started = [job.id for job in jobs if job.state == "RUNNING" and joiner(job.id) not in self._came]
        self._running_since = {id: self._running_since.get(id, now) for id in started}
        if overdue := [id for id, since in self._running_since.items() if now - since > _START_TIMEOUT]:
            await self._source.cancel(overdue)

    def _complain(self, problem: str) -> None:
        """Once, until something else is wrong."""
        if problem != self._told:
            self._told = problem
            self._event("growth_problem", {"reason": problem})
