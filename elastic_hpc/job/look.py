"""Looks at jobs: reads their records, and asks Slurm for what these cannot say, with one question for all of them. What
that means is decided in ``view.job``.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.record.rundir import EventReader, RunDir
from elastic_hpc.slurm import LIVES, Queued
from elastic_hpc.view.job import JobView, Seen, view
from elastic_hpc.view.story import Story, tell


class Look(NamedTuple):
    """One job at one moment. ``events``: all of its record."""

    view: JobView
    story: Story
    events: Sequence[Mapping[str, Any]]


def recorded(rundir: RunDir) -> Seen:
    """What the job's run directory says, its events left out. A damaged file says nothing."""
    asked, verdict, endpoint = (_read(rundir, f"{name}.json") for name in ("spec", "verdict", "endpoint"))
    known = {"outcome", "cause", "reason", "failure"} <= verdict.keys() and isinstance(verdict.get("run"), int)
    ended, led, beat, held = verdict if known else None, endpoint.get("run"), rundir.heartbeat(), None
    with contextlib.suppress(OSError):  # another user's
        held = rundir.is_held()
    return Seen(
        id=rundir.path.name,
        slurm_id=str((ended and rundir.goes_on_as(ended["run"])) or asked.get("job", rundir.path.name)),
        run_dir=str(rundir.path),
        script=os.path.basename(str(asked.get("script", ""))),
        verdict=ended,
        led=led if isinstance(led, int) else 0,
        held=held,
        silent=max(0.0, time.time() - beat / 1e9) if beat else None,
    )


def _read(rundir: RunDir, name: str) -> dict[str, Any]:
    with contextlib.suppress(ElasticError, OSError):
        return rundir.read(name) or {}
    return {}


class Jobs:
    """Jobs that are looked at again and again: of their events only what was added is read."""

    def __init__(self, run_dirs: Sequence[RunDir]) -> None:
        self._records = [(rundir, EventReader(rundir)) for rundir in run_dirs]
        self._asked = float("-inf")
        self._asked_for: set[str] = set()
        self._known: dict[str, Queued] = {}
        self._batches: dict[str, slurm.SlurmJob | None] = {}
        self.problem = ""
        """Why Slurm cannot be asked; empty if there was no need to."""

    def look(self, ask_every: float = 0.0) -> list[Look]:
        """How they are now; Slurm is asked if the last time is ``ask_every`` seconds ago."""
        seen = [recorded(rundir) for rundir, _ in self._records]
        self._ask(seen, ask_every)
        if any(self._has_ended(one) for one in seen):  # its record may say so too by now, or that another goes on
            seen = [recorded(rundir) for rundir, _ in self._records]
            self._ask(seen, float("inf"))
        found = []
        for one, (_, reader) in zip(seen, self._records, strict=True):
            reader.read()
            story = tell(reader.events, reader.damaged)
            found.append(Look(view(self._with_slurm(one, story), story, time.time()), story, reader.events))
        return found

    def _ask(self, seen: Sequence[Seen], ask_every: float) -> None:
        """All that have not ended by their records; at once, if one of them was not asked about before."""
        ids = {one.slurm_id for one in seen if _is_slurms(one)}
        if not ids:
            self.problem = ""
            return
        if ids <= self._asked_for and time.monotonic() - self._asked < ask_every:
            return
        self._asked, self._asked_for = time.monotonic(), ids
        try:
            self._known, self.problem = slurm.queue(*sorted(ids)), ""
        except SlurmError as error:
            self.problem = f"Slurm cannot be asked: {error}"

    def _has_ended(self, seen: Seen) -> bool:
        """By what Slurm says alone."""
        known = self._of(seen.slurm_id)
        return _is_slurms(seen) and not self.problem and (known is None or known.state not in LIVES)

    def _of(self, id: str) -> Queued | None:
        """What Slurm knows of it; of an array that has not started what it knows of its first task."""
        tasks = (known for task, known in self._known.items() if task.startswith(f"{id}_"))
        return self._known.get(id) or next(tasks, None)

    def _with_slurm(self, seen: Seen, story: Story) -> Seen:
        if not _is_slurms(seen):
            return seen
        known = self._of(seen.slurm_id)
        seen = replace(seen, known=known, problem=self.problem)
        if story.runs or known is None or not self._has_ended(seen):
            return seen
        batch = self._batch(seen.slurm_id)
        written = [os.path.dirname(path) for path in (batch.output, batch.error)] if batch else []
        return replace(seen, batch=batch, lacks=next((path for path in written if _is_missing(path)), ""))

    def _batch(self, id: str) -> slurm.SlurmJob | None:
        if id not in self._batches:
            self._batches[id] = None
            with contextlib.suppress(SlurmError):
                self._batches[id] = slurm.show_job(id)
        return self._batches[id]


def _is_slurms(seen: Seen) -> bool:
    """Whether only Slurm knows if it runs. One id that is none would have squeue refuse the whole question."""
    return not seen.final and seen.held is None and re.fullmatch(r"\d+(_\d+)?", seen.slurm_id, re.ASCII) is not None


def _is_missing(folder: str) -> bool:
    return "%" not in folder and os.path.isabs(folder) and not os.path.isdir(folder)
