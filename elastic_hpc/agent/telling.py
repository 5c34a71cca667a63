"""What the leader's agent reports about the job's progress: a comment in Slurm, a notification at a standstill."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from elastic_hpc import slurm
from elastic_hpc.agent import lookout, notify
from elastic_hpc.agent.threads import on_thread
from elastic_hpc.environment import NOTIFY, NOTIFY_AFTER
from elastic_hpc.errors import SlurmError
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.standstill import Standstill
from elastic_hpc.record.rundir import RunDir

log = logging.getLogger(__name__)

_LOOK_EVERY = 5.0
"""Seconds between two looks at the progress. A new world is written at once, and a new step once a minute."""

_OURS = "elastic_hpc: "
"""Prefix of our comments. A comment of the user stays unchanged."""


class Comment:
    """Keeps the comment of ``job``, which ``squeue -o %k`` shows, up to date until the site refuses it."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._last = ""
        self._world: tuple[object, ...] = ()
        self._written = 0.0
        self._is_off = False

    @property
    def outlook(self) -> lookout.Outlook:
        return lookout.Outlook("the job's comment", _LOOK_EVERY, self._look)

    async def _look(self, leader: Leader) -> None:
        progress, now = leader.progress, asyncio.get_running_loop().time()
        text, world = f"{_OURS}{progress}", (*progress[:-1], progress.step is None)
        is_due = world != self._world or now - self._written >= lookout.ASK_EVERY
        if progress.nodes and is_due and not self._is_off and text != self._last:
            self._world, self._written = world, now
            await on_thread(self._write, text)

    def _write(self, text: str) -> None:
        try:
            before = "" if self._last else slurm.comment(self._job)
            self._is_off = bool(before) and not before.startswith(_OURS)
            if not self._is_off:
                slurm.write_comment(self._job, text)
                self._last = text
        except SlurmError as error:
            log.debug("the job's comment in Slurm stays as it is: %s", error)
            self._is_off = True


class StandstillAlarm:
    """Sends a notification when the job makes no progress, if the user wants notifications (``wanted``)."""

    def __init__(self, rundir: RunDir, environ: Mapping[str, str]) -> None:
        self._rundir, self._environ = rundir, environ
        self._standstill = Standstill(float(environ[NOTIFY_AFTER]))

    @staticmethod
    def wanted(environ: Mapping[str, str]) -> bool:
        return bool(environ.get(NOTIFY))

    @property
    def outlook(self) -> lookout.Outlook:
        return lookout.Outlook("the job's progress", min(30.0, self._standstill.after / 4), self._look)

    async def _look(self, leader: Leader) -> None:
        if reason := self._standstill.look(leader.progress, asyncio.get_running_loop().time()):
            log.warning("no progress: %s", reason)
            await on_thread(self._tell, reason)

    def _tell(self, reason: str) -> None:
        if problem := notify.send(notify.of_standstill(self._rundir, reason), self._environ):
            log.warning("%s", problem)
