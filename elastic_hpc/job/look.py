"""Observes jobs: reads their records, and asks Slurm for what is not in the records, with one query for all jobs.
``view.job`` decides what the observation means.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.record.events import EventReader
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.job import JobView, view
from elastic_hpc.view.state import Observed
from elastic_hpc.view.story import Story
from elastic_hpc.view.story_builder import StoryBuilder

_RECENT = 24 * 3600.0
"""Seconds after its end during which a job is listed when the user names no job."""


_TAIL, _LINES = 4096, 10
"""Bytes that are read at the end of a batch script's output, and lines that are shown of them, at most."""


class Look(NamedTuple):
    """One job at one moment. ``events``: the events of its record, without progress."""

    view: JobView
    story: Story
    events: Sequence[Mapping[str, Any]]

    def is_recent(self) -> bool:
        """Whether the job is active, ended within the last day, or ended unstarted and Slurm still knows it."""
        never_started = not self.story.runs and not self.view.script
        if not self.view.over or (never_started and self.view.state != "UNKNOWN"):
            return True
        return time.time() - self._ended < _RECENT

    @property
    def place(self) -> tuple[int, float]:
        """The place of the job in a list: first jobs with nodes, then waiting jobs, then ended jobs, the last first."""
        return (2, -self._ended) if self.view.over else (0 if self.view.has_nodes else 1, 0.0)

    @property
    def _ended(self) -> float:
        """When the job ended, as far as is known."""
        return self.story.last_time or _mtime(self.view.run_dir)


def may_be_recent(rundir: RunDir) -> bool:
    """Whether ``Look.is_recent`` may be true; cheap for a job that ended long ago according to its record."""
    files = (str(rundir.path / name) for name in ("verdict.json", "heartbeat", "endpoint.json"))
    if time.time() - max(map(_mtime, files)) < _RECENT:
        return True
    verdict = _read(rundir, "verdict.json")
    return verdict.get("outcome") in {None, "requeue"} or rundir.acted(verdict.get("run", 0)) is not None


class JobRecord:
    """The record of a job, whose story continues as events are added."""

    def __init__(self, folder: Path) -> None:
        """``folder``: the run directory."""
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        self._reader, self._builder = EventReader(self._folder, for_screens=True), StoryBuilder()

    def story(self) -> Story:
        """The story up to now. Reads only what was added since the last call. Raises ElasticError."""
        added = self._reader.read()
        if self._reader.is_new_story:
            self._begin()
            added = self._reader.read()
        self._builder.add(added)
        return self._builder.story(self._reader.damaged)

    @property
    def events(self) -> Sequence[Mapping[str, Any]]:
        """The events of the story, without progress."""
        return self._reader.events


def recorded(rundir: RunDir) -> Observed:
    """What the files of the run directory say, without the events. A damaged file counts as missing."""
    spec, verdict, endpoint = (_read(rundir, f"{name}.json") for name in ("spec", "verdict", "endpoint"))
    if not ({"outcome", "cause", "reason", "failure"} <= verdict.keys() and isinstance(verdict.get("run"), int)):
        verdict = {}
    heartbeat, held = rundir.heartbeat(), None
    leader_run = endpoint["run"] if isinstance(endpoint.get("run"), int) else 0
    last_run = max(leader_run, verdict.get("run", 0))
    led = str(spec.get("job", rundir.path.name))
    with contextlib.suppress(OSError):  # the job of another user
        held = rundir.is_held()
    return Observed(
        id=rundir.path.name,
        slurm_id=rundir.goes_on_as(last_run) or led,
        run_dir=str(rundir.path),
        script=os.path.basename(str(spec.get("script", ""))),
        verdict=verdict or None,
        leader_run=leader_run,
        resumed=rundir.acted(last_run) not in {None, led},
        launcher_runs=held,
        silent=max(0.0, time.time() - heartbeat / 1e9) if heartbeat else None,
    )


def _read(rundir: RunDir, name: str) -> dict[str, Any]:
    with contextlib.suppress(ElasticError, OSError):
        return rundir.read(name) or {}
    return {}


class Jobs:
    """Jobs to observe repeatedly. Each look reads only the events that were added since the last look."""

    def __init__(self, run_dirs: Sequence[RunDir], *, also_unreadable: bool = False) -> None:
        """``also_unreadable``: a look includes a job whose record cannot be read, with the problem as its note;
        otherwise ``look`` raises ElasticError.
        """
        self._also_unreadable = also_unreadable
        self._records: list[tuple[RunDir, JobRecord]] = []
        self.observe(run_dirs)
        self._last_query = float("-inf")
        self._queried_ids: set[str] = set()
        self._queue: dict[str, slurm.Queued] = {}
        """The answer of the last query, by id."""
        self._ended: dict[str, slurm.SlurmJob | None] = {}
        """What Slurm says about jobs that ended before an agent led them; None if Slurm does not know the job."""
        self._recorded: dict[str, str] = {}
        """Slurm's words for the ends of jobs, by id; empty for a job that Slurm does not know."""
        self.problem = ""
        """Why Slurm did not answer; empty if it answered, or if there was nothing to ask."""
        self.unreadable: set[str] = set()
        """The run directories whose records could not be read in the last look."""

    def observe(self, run_dirs: Sequence[RunDir]) -> None:
        """From now on observe these jobs; keeps what was already read of them."""
        known = {rundir.path: record for rundir, record in self._records}
        self._records = [(rundir, known.get(rundir.path) or JobRecord(rundir.path)) for rundir in run_dirs]

    def look(self, query_interval: float = 0.0, *, ends: bool = False) -> list[Look]:
        """The jobs as they are now. Asks Slurm if the last query was at least ``query_interval`` seconds ago. ``ends``:
        also asks Slurm, once for each job that has ended, which end it has recorded.
        """
        observed = [recorded(rundir) for rundir, _ in self._records]
        self._query(observed, query_interval)
        if any(map(self._slurm_says_ended, observed)):  # by now the record may contain the end, or a successor
            observed = [recorded(rundir) for rundir, _ in self._records]
            self._query(observed, float("inf"))
        looks = []
        self.unreadable.clear()
        for seen, (_, record) in zip(observed, self._records, strict=True):
            note = ""
            try:
                story = record.story()
            except (ElasticError, OSError) as error:
                if not self._also_unreadable:
                    raise
                story, note = StoryBuilder().story(0), str(error)
                self.unreadable.add(seen.run_dir)
            job = self._with_slurm(seen, story)
            if ends and (job.final or (_needs_slurm(job) and job.queued is None and not self.problem)):
                job = replace(job, recorded_end=self._recorded_end(job))
            seen_now = view(job, story, time.time())
            looks.append(Look(replace(seen_now, note=note) if note else seen_now, story, record.events))
        return looks

    def _query(self, observed: Sequence[Observed], interval: float) -> None:
        """Ask Slurm about all jobs whose records have no end; at once, if the last query left out such a job."""
        ids = {job.slurm_id for job in observed if _needs_slurm(job)}
        if not ids:
            self.problem = ""
            return
        if ids <= self._queried_ids and time.monotonic() - self._last_query < interval:
            return
        self._last_query, self._queried_ids = time.monotonic(), ids
        try:
            self._queue, self.problem = slurm.queue(*sorted(ids)), ""
        except SlurmError as error:
            self.problem = f"Slurm cannot be asked: {error}"

    def _slurm_says_ended(self, job: Observed) -> bool:
        queued = self._queued(job.slurm_id)
        return _needs_slurm(job) and not self.problem and (queued is None or queued.state not in slurm.LIVES)

    def _queued(self, id: str) -> slurm.Queued | None:
        """The last answer for the job ``id``; for an array that has not started, the answer for its first task."""
        tasks = (queued for task, queued in self._queue.items() if task.startswith(f"{id}_"))
        return self._queue.get(id) or next(tasks, None)

    def _with_slurm(self, job: Observed, story: Story) -> Observed:
        if not _needs_slurm(job):
            return job
        queued = self._queued(job.slurm_id)
        job = replace(job, queued=queued, problem=self.problem)
        if (story.runs and not job.resumed) or queued is None or not self._slurm_says_ended(job):
            return job
        ended = self._show_ended(job.slurm_id)
        folders = [os.path.dirname(path) for path in (ended.output, ended.error)] if ended else []
        output = next(filter(None, map(_last_lines, (ended.error, ended.output))), ()) if ended else ()
        return replace(job, ended=ended, missing_folder=next(filter(_is_missing, folders), ""), output=output)

    def _recorded_end(self, job: Observed) -> str:
        """Only for a job with a batch script of ours: an allocation in which ``elastic-srun`` ran has its own end."""
        if not (_is_slurms(job) and os.path.exists(os.path.join(job.run_dir, "script.sbatch"))):
            return ""
        if self._recorded.get(job.slurm_id, "") in {"", *slurm.LIVES}:
            self._recorded[job.slurm_id] = slurm.recorded_end(job.slurm_id)
        return self._recorded[job.slurm_id]

    def _show_ended(self, id: str) -> slurm.SlurmJob | None:
        if id not in self._ended:
            self._ended[id] = None
            with contextlib.suppress(SlurmError):
                self._ended[id] = slurm.show_job(id)
        return self._ended[id]


def _needs_slurm(job: Observed) -> bool:
    """Whether only Slurm knows if the job runs. squeue refuses a whole query if one id is not a Slurm id."""
    return not job.final and _is_slurms(job)


def _is_slurms(job: Observed) -> bool:
    return job.launcher_runs is None and re.fullmatch(r"\d+(_\d+)?", job.slurm_id, re.ASCII) is not None


def _is_missing(folder: str) -> bool:
    return "%" not in folder and os.path.isabs(folder) and not os.path.isdir(folder)


def _last_lines(path: str) -> tuple[str, ...]:
    """The last lines of the file at ``path``, without control characters; none if it cannot be read."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                file.seek(max(0, os.stat(path).st_size - _TAIL))
                lines = file.read().decode(errors="replace").split("\n")
            shown = (re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line).rstrip() for line in lines)
            return tuple(filter(None, shown))[-_LINES:]
    return ()


def _mtime(path: str) -> float:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0
