"""Which agent ends or requeues a job that has lost its leader: the first agent that takes a turn in the run directory.
If it fails, the next agent takes a turn. If hundreds of agents acted at once, they would overload slurmctld.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.growth import Backoff
from elastic_hpc.record.rundir import RunDir

TURN = 60.0
"""Seconds until the next agent may take a turn."""


class Turns:
    """The turns of one agent. A turn is the file ``turn.RUN.NUMBER``, which names the node that acts. The file
    ``acts.RUN`` exists when the other agents may leave.
    """

    def __init__(self, rundir: RunDir, run: int, node: str) -> None:
        self._rundir = rundir
        self._node = node
        self._turn, self._done = f"turn.{run}.", f"acts.{run}"
        self._last = 0
        """The number of the last turn that an agent has taken."""
        self._noticed_at = 0.0
        """When this agent noticed that turn."""
        self._mine = False
        self._backoff = Backoff()

    def take(self) -> bool:
        """Whether this agent must act now. If the run directory cannot be written, every agent that asks must act."""
        now = time.monotonic()
        last = max((int(name.removeprefix(self._turn)) for name in self._names() if self._is_turn(name)), default=0)
        if last > self._last:
            self._last, self._noticed_at, self._mine = last, now, False
        if self._mine:
            return now >= self._backoff.at
        if self._last and now - self._noticed_at < TURN:
            return False
        try:
            self._mine = self._rundir.claim(f"{self._turn}{self._last + 1}", self._node)
        except ElasticError:
            return now >= self._backoff.at
        self._last, self._noticed_at = self._last + 1, now
        return self._mine

    def failed(self) -> None:
        """This agent has failed, and tries again later, until another agent takes the next turn."""
        self._backoff.failed(time.monotonic())

    def done(self, stands: Callable[[], bool] = lambda: True) -> None:
        """The other agents may leave: this agent has acted, and a deputy replaces it if this node is lost now.
        ``stands()``: whether no leader has withdrawn the verdict meanwhile.
        """
        try:
            self._rundir.claim(self._done, self._node)
        except ElasticError:
            return  # the end of the job ends the other agents too
        if not stands():
            with contextlib.suppress(OSError):
                (self._rundir.path / self._done).unlink(missing_ok=True)

    def are_done(self) -> bool:
        return self._done in self._names()

    def _is_turn(self, name: str) -> bool:
        return name.startswith(self._turn) and name.removeprefix(self._turn).isdecimal()

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._rundir.path)
        except OSError:
            return []
