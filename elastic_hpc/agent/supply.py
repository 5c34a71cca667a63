"""Brings the nodes that a leader could use: agents are restarted on the job's own nodes, and further jobs bring
nodes.

``membership.growth`` decides what to do about these jobs, the joiners; a ``Source`` does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership import growth
from elastic_hpc.membership.growth import WORTH, Backoff, Growth, JoinerJob, Needs, Patience
from elastic_hpc.membership.nodes import joiner
from elastic_hpc.membership.roster import Host
from elastic_hpc.network.tasks import within

log = logging.getLogger(__name__)

_START_TIMEOUT = 300.0
"""Seconds that an agent may take from the start of its job, or of its job step, until it is connected; the environment
may lie on a slow file system.
"""

_WASTED_AT_MOST = 2
"""Number of joiners that may end on a node before their agents are connected; then the node is excluded."""

_FAILED = (ElasticError, OSError)

_POLL, _POLL_AT_MOST = 0.5, 60.0
"""Seconds between two queries of the queue and of the lost nodes; doubled each time nothing has changed."""


class Source(Protocol):
    """Slurm (``joiners.SlurmSource``), or a simulated one. All methods except ``lacks_agent`` raise ElasticError."""

    async def lacks_agent(self, host: Host) -> bool:
        """Whether ``host`` answers and has no agent. False if ``host`` has no power, or cannot be reached."""

    async def restart(self, host: Host) -> bool:
        """Start an agent on ``host``. False if the job no longer has that node."""

    async def starting(self) -> Mapping[str, str]:
        """The job steps of ``restart`` that have not ended, of this leader and of earlier leaders, by the name of their
        node.
        """

    async def joiners(self) -> Sequence[JoinerJob]:
        """The jobs that wait or run."""

    async def remaining(self) -> float:
        """Seconds until the job's time limit."""

    async def shorten(self, ids: Collection[str], seconds: float) -> None:
        """Give the waiting joiners ``ids`` a time limit of ``seconds``."""

    async def submit(self, exclude: Collection[str]) -> str:
        """Submit one joiner, for any node but ``exclude``. Returns the id of its job."""

    async def give_back(self, names: Collection[str]) -> None:
        """Remove these nodes, whose agents have left, from the job. Nodes that the job does not have are no error."""

    async def cancel(self, ids: Collection[str]) -> None:
        """End these jobs or job steps."""


class _Restart:
    """The restart of the agent of one node."""

    def __init__(self) -> None:
        self.backoff = Backoff()
        self.task: asyncio.Task[None] | None = None
        self.starting_since: float | None = None
        """When this leader first knew of the job step in which the agent starts."""
        self.impossible = False
        """Whether the job no longer has the node."""


class Supply:
    """Serves one leader until ``run`` is cancelled; ``event`` records what it does. After the verdict ``conclude``
    cancels the joiners that are left.
    """

    def __init__(self, source: Source, event: Callable[[str, dict[str, Any]], None], *, grow: bool) -> None:
        self._source = source
        self._event = event
        self._grow = grow
        self._needs: Needs | None = None
        self._restarts: dict[int, _Restart] = {}
        self._jobs: dict[str, JoinerJob] = {}
        """The joiners in the last answer of the queue, by id."""
        self._came: dict[int, float] = {}
        """When each joiner was first connected, by number."""
        self._wasted = Counter[str]()
        """How many joiners have ended before they were connected, by node."""
        self._started_at: dict[str, float] = {}
        """When a running joiner that is not connected was first found in the queue, by id."""
        self._queue_is_current = False
        """Whether ``_jobs`` includes all joiners that were submitted."""
        self._growth = Growth(0, (), 0, 0)
        self._backoff, self._patience = Backoff(), Patience()
        self._problem = ""
        """The last problem that was recorded."""
        self._not_given_back: dict[str, Any] = {}
        """The last event of that name."""
        self._changed = asyncio.Event()

    def need(self, needs: Needs) -> None:
        """What the leader could use now."""
        if needs == self._needs:
            return
        now = asyncio.get_running_loop().time()
        taken = needs.taken - (self._needs.taken if self._needs else frozenset())
        self._came |= dict.fromkeys(needs.joiners - self._came.keys(), now)
        self._needs = needs
        self._changed.set()
        stays = [now - self._came[number] for number in taken & self._came.keys()]
        if stays and self._patience.taken(now, max(stays)) and self._grow and needs.nodes:
            self._record_problem(
                f"Slurm takes new nodes away within {WORTH / 60:.0f} minutes: the next joiner is submitted in "
                f"{self._patience.at - now:.0f} s"
            )

    async def run(
        self, report: Callable[[Needs, int, int], None], given_back: Callable[[Collection[int]], None]
    ) -> None:
        """See ``network.server.Supplier``."""
        loop = asyncio.get_running_loop()
        poll: float | None = None
        needs = self._needs
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(poll, self._changed.wait())
            self._changed.clear()
            before, needs = (needs, self._growth), self._needs
            assert needs
            await self._give_back(needs.surplus, given_back)
            restarting = await self._restart(needs.missing)
            if self._grow and (needs.nodes or self._jobs or not self._queue_is_current):
                self._growth = await self._provide(needs, restarting)
            report(needs, restarting + self._growth.starting, self._growth.pending)
            if not (needs.missing or needs.surplus or (self._grow and (needs.nodes or self._jobs))):
                poll = None
            elif poll is None or (needs, self._growth) != before:
                poll = _POLL
            else:
                poll = min(2 * poll, _POLL_AT_MOST)
            due = self._may_submit_at - loop.time()
            if poll and needs.nodes and due > 0:
                poll = min(poll, max(due, 1.0))

    @property
    def _may_submit_at(self) -> float:
        return max(self._backoff.at, self._patience.at)

    # nodes that are returned to Slurm

    async def _give_back(self, surplus: Collection[Host], given_back: Callable[[Collection[int]], None]) -> None:
        if not surplus:
            return
        try:
            await self._source.give_back([host.name for host in surplus])
        except _FAILED as error:
            problem = {"nodes": sorted(host.name for host in surplus), "reason": str(error)}
            if problem != self._not_given_back:
                self._not_given_back = problem
                self._event("not_given_back", problem)
        else:
            given_back([host.node for host in surplus])

    # agents that are restarted

    async def _restart(self, missing: Collection[Host]) -> int:
        """Start agents on nodes that answer and have no agent. Returns how many agents are starting."""
        now = asyncio.get_running_loop().time()
        lost = {host.node: host for host in missing}
        for node, restart in self._restarts.items():
            if node not in lost:  # its agent is connected again
                restart.starting_since = None
        restarts = {node: self._restarts.setdefault(node, _Restart()) for node in lost}
        candidates = [node for node, restart in restarts.items() if not (restart.impossible or restart.task)]
        answers = await asyncio.gather(*(self._source.lacks_agent(lost[node]) for node in candidates))
        lacking = [node for node, lacks in zip(candidates, answers, strict=True) if lacks]
        try:
            steps = await self._source.starting() if lacking else {}
            for node in lacking:
                await self._start_unless_starting(lost[node], restarts[node], steps.get(lost[node].name))
        except _FAILED as error:
            self._record_problem(f"no new agent on {lost[lacking[0]].name}: {error}")
        return sum(bool(restart.task) or _is_expected(restart, now) for restart in restarts.values())

    async def _start_unless_starting(self, host: Host, restart: _Restart, step: str | None) -> None:
        """Start an agent on ``host``, unless an agent starts there in the job step ``step``. A step that takes too long
        is cancelled first, so that a node never has two agents.
        """
        now = asyncio.get_running_loop().time()
        if step is None:
            restart.starting_since = None
            if now >= restart.backoff.at:
                restart.task = asyncio.ensure_future(self._start(host, restart))
        elif restart.starting_since is None:
            restart.starting_since = now
        elif not _is_expected(restart, now):
            restart.starting_since = now
            await self._source.cancel([step])
            self._record_problem(f"the new agent on {host.name} has not started in {_START_TIMEOUT:.0f} s")

    async def _start(self, host: Host, restart: _Restart) -> None:
        now = asyncio.get_running_loop().time()
        restart.backoff.failed(now)
        try:
            restart.impossible = not await self._source.restart(host)
            if not restart.impossible:
                restart.starting_since = now
                self._event("agent_restart", {"node": host.name})
        except _FAILED as error:
            self._record_problem(f"no new agent on {host.name}: {error}")
        finally:
            restart.task = None
            self._changed.set()

    # joiners

    async def _provide(self, needs: Needs, restarting: int) -> Growth:
        """Submit and cancel joiners. Returns how many are then starting and pending."""
        came = frozenset(self._came)  # as of ``needs``, which counts a joiner that comes meanwhile as lacking
        try:
            jobs = await self._source.joiners()
            remaining = await self._source.remaining() if needs.nodes or jobs else 0.0
            self._queue_is_current = True
            self._count_wasted(jobs, needs)
            await self._cancel_overdue(jobs)
            plan = growth.plan_growth(needs, jobs, came=came, restarting=restarting, remaining=remaining)
            if plan.cancel:
                await self._source.cancel(plan.cancel)
                self._came |= dict.fromkeys(map(joiner, plan.cancel), asyncio.get_running_loop().time())
                self._event("joiners_cancelled", {"jobs": plan.cancel})
            if plan.shorten:
                await self._source.shorten(plan.shorten, remaining)
        except _FAILED as error:
            self._record_problem(str(error))
            return self._growth
        for id, reason in plan.held[:1]:  # the others usually wait for the same reason
            self._record_problem(f"joiner {id} does not start when nodes are free: {reason}")
        submitted = await self._submit(plan.submit, needs)
        return Growth(0, (), plan.starting, plan.pending + submitted)

    async def _submit(self, count: int, needs: Needs) -> int:
        """Submit ``count`` joiners, while the leader still needs that many. Returns how many Slurm has accepted."""
        now = asyncio.get_running_loop().time
        useless = {node for node, times in self._wasted.items() if times >= _WASTED_AT_MOST and node}
        accepted: list[str] = []
        while len(accepted) < min(count, self._needs.nodes if self._needs else 0) and now() >= self._may_submit_at:
            try:
                accepted.append(await self._source.submit(needs.names | useless))
                self._backoff.succeeded()
            except _FAILED as error:
                self._backoff.failed(now())
                self._record_problem(f"no joiner: {error}")
        if accepted:
            self._problem = ""
            self._event("joiners", {"jobs": accepted, "wanted": needs.nodes})
            self._queue_is_current = False
        return len(accepted)

    def _count_wasted(self, jobs: Sequence[JoinerJob], needs: Needs) -> None:
        """Note joiners that have ended before they were connected: their nodes may be of no use, and the next joiner is
        submitted later. A joiner does not count if another agent came from the same node, which jobs may share.
        """
        current = {job.id: job for job in jobs}
        for id, job in self._jobs.items():
            if id not in current and joiner(id) not in self._came and job.node not in needs.names:
                self._backoff.failed(asyncio.get_running_loop().time())
                self._wasted[job.node] += 1
                self._record_problem(f"joiner {id} ended{f' on {job.node}' if job.node else ''} before it joined")
        self._jobs = current

    async def _cancel_overdue(self, jobs: Sequence[JoinerJob]) -> None:
        """Cancel joiners that have started long ago and are not connected: they hold a node without any use."""
        now = asyncio.get_running_loop().time()
        started = [job.id for job in jobs if job.state == "RUNNING" and joiner(job.id) not in self._came]
        self._started_at = {id: self._started_at.get(id, now) for id in started}
        if overdue := [id for id, started_at in self._started_at.items() if now - started_at > _START_TIMEOUT]:
            await self._source.cancel(overdue)

    def _record_problem(self, problem: str) -> None:
        """Record ``problem``, unless it was the last one recorded."""
        if problem != self._problem:
            self._problem = problem
            self._event("growth_problem", {"reason": problem})


def _is_expected(restart: _Restart, now: float) -> bool:
    """Whether the agent starts, and has not taken too long."""
    return restart.starting_since is not None and now - restart.starting_since < _START_TIMEOUT
