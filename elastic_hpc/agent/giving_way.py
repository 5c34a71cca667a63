"""Gives nodes of the job to other jobs that wait: looks at Slurm's queue, and caps the job accordingly.

``membership.yielding`` decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from elastic_hpc import slurm
from elastic_hpc.agent import lookout
from elastic_hpc.agent.threads import on_thread
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.yielding import Event, Holding, Rule, Yielding, next_yielding
from elastic_hpc.slurm import others


class GivingWay:
    """Serves one leader; ``event`` records which nodes are given up for which job, and what happens to them."""

    def __init__(self, rule: Rule, job: str, event: Callable[[str, dict[str, Any]], None]) -> None:
        """``job``: what squeue calls the job."""
        self._rule, self._job, self._event = rule, job, event
        self._state = Yielding()
        self._lets_shrink: bool | None = None
        """Whether the site allows a job to give up its own nodes; None until known."""

    @property
    def outlook(self) -> lookout.Outlook:
        return lookout.Outlook("Slurm's queue", lookout.ASK_EVERY, self._look)

    async def _look(self, leader: Leader) -> None:
        loop = asyncio.get_running_loop()
        if holding := leader.holding(self._job):
            self._state, events = await on_thread(self._next, holding, loop.time())
            for name, fields in events:
                self._event(name, fields)
            leader.on_cap(self._state.cap, self._state.reason, loop.time())

    def _next(self, holding: Holding, now: float) -> tuple[Yielding, list[Event]]:
        """Queries more than the jobs only if a job other than a joiner waits."""
        jobs = others.all_jobs()
        if not any(job.waits and not job.is_joiner for job in jobs):
            return next_yielding(self._state, self._rule, holding, jobs, (), now)
        if self._lets_shrink is None:
            self._lets_shrink = slurm.lets_shrink()
        if not self._lets_shrink:
            holding = replace(holding, least=max(holding.least, holding.own))
        return next_yielding(self._state, self._rule, holding, jobs, others.all_nodes(), now)
