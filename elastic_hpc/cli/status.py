"""``elastic-hpc status``: how one's jobs are."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from elastic_hpc import slurm
from elastic_hpc.cli.jobs import add_job
from elastic_hpc.errors import ElasticError, SlurmError, UsageError
from elastic_hpc.job import Job
from elastic_hpc.registry import known
from elastic_hpc.rundir import EventReader, RunDir
from elastic_hpc.slurm import Queued
from elastic_hpc.view import status
from elastic_hpc.view.status import JobView
from elastic_hpc.view.story import Story, tell

HELP = "show how my jobs are: nodes, round, restarts, progress, time lost"
_EPILOG = """examples:
  elastic-hpc status                    all jobs that are not over, and those that ended within a day
  elastic-hpc status 4711               one job, in detail
  elastic-hpc status 4711 --watch       until it ends, or Ctrl-C
  elastic-hpc status --json | jq '.jobs[] | select(.state == "RUNNING") | .goodput'

A state of UNKNOWN means what it says: Slurm could not be asked, or does not know the job, and its record has no end."""

_LATELY = 24 * 3600.0
_LOOK, _ASK_SLURM = 1.0, 10.0  # seconds between two looks of --watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    add_job(parser, "*", started=False)
    parser.epilog = _EPILOG
    parser.add_argument("--all", action="store_true", help="also jobs that ended more than a day ago")
    parser.add_argument("--watch", action="store_true", help="show it live, until all have ended, or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON object, described in docs/status.md")


class Jobs:
    """Jobs that are looked at again and again: of their records only what was added is read."""

    def __init__(self, run_dirs: Sequence[RunDir]) -> None:
        self._jobs = [(rundir, EventReader(rundir)) for rundir in run_dirs]
        self._asked = float("-inf")
        self._known: dict[str, Queued] = {}
        self.problem = ""
        """Why Slurm cannot be asked; empty if all have ended by their records."""

    def look(self, ask_every: float = 0.0) -> list[tuple[JobView, Story]]:
        """How they are now; Slurm is asked if the last time is ``ask_every`` seconds ago."""
        jobs = [(rundir, reader, Job(rundir.path)) for rundir, reader in self._jobs]
        stories = []
        for _, reader, _ in jobs:
            reader.read()
            stories.append(tell(reader.events, reader.damaged))
        finals = [_damaged_is_none(job.final_state) for *_, job in jobs]
        held = [rundir.is_held() for rundir, *_ in jobs]
        ids = [_damaged_is_none(lambda job=job: job.slurm_id) or job.id for *_, job in jobs]
        self._ask(
            [id for id, final, local in zip(ids, finals, held, strict=True) if not final and local is None], ask_every
        )
        found, now = [], time.time()
        for (rundir, _, job), story, final, local, id in zip(jobs, stories, finals, held, ids, strict=True):
            asked = _damaged_is_none(lambda rundir=rundir: rundir.read("spec.json")) or {}
            beat = rundir.heartbeat()
            seen = status.Seen(
                id=job.id,
                run_dir=str(rundir.path),
                script=os.path.basename(str(asked.get("script", ""))),
                final=final,
                known=self._of(id) if local is None else _launcher(local=local),
                problem="" if local is not None else self.problem,
                silent=max(0.0, now - beat / 1e9) if beat else None,
            )
            found.append((status.view(seen, story, now), story))
        return found

    def _of(self, id: str) -> Queued | None:
        """What Slurm knows of it; of an array that has not started what it knows of its first task."""
        tasks = (known for task, known in self._known.items() if task.startswith(f"{id}_"))
        return self._known.get(id) or next(tasks, None)

    def _ask(self, ids: Sequence[str], ask_every: float) -> None:
        if not ids:
            self.problem = ""
            return
        if time.monotonic() - self._asked < ask_every:
            return
        self._asked = time.monotonic()
        try:
            self._known, self.problem = slurm.queue(*ids), ""
        except SlurmError as error:
            self.problem = f"Slurm cannot be asked: {error}"


def _launcher(*, local: bool) -> Queued:
    return Queued("RUNNING" if local else "FAILED", None, None, "")


def _damaged_is_none(read: Any) -> Any:
    """A damaged file says nothing."""
    with contextlib.suppress(ElasticError, OSError, KeyError, TypeError):
        return read()
    return None


def chosen() -> list[RunDir]:
    """All jobs of mine that are known: submitted lately, or in ./elastic-logs."""
    here = [path for path in Path("elastic-logs").glob("*") if (path / "spec.json").exists()]
    paths = dict.fromkeys(
        [*known(), *sorted((path.absolute() for path in here), key=lambda path: (len(path.name), path.name))]
    )
    return [RunDir(path) for path in paths]


def of_interest(view: JobView, story: Story) -> bool:
    """Whether it is not over, or has ended lately."""
    last = story.last_time or _mtime(view.run_dir)
    if view.state == "UNKNOWN" and not story.runs and not view.script:
        return False  # it never started, and is gone
    return (not view.over and view.state != "UNKNOWN") or time.time() - last < _LATELY


def _mtime(path: str) -> float:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0


def run(args: argparse.Namespace) -> int:
    """The command; the answer is its exit code: 1 if Slurm could not be asked."""
    if args.watch and args.json:
        raise UsageError("--watch and --json: expected one of them; call --json again and again instead")
    jobs = Jobs(args.job or chosen())
    if args.watch:
        return _watch(jobs, args)
    found = jobs.look()
    if not (args.job or args.all):
        found = [(view, story) for view, story in found if jobs.problem or of_interest(view, story)]
    if args.json:
        json.dump(status.as_json([view for view, _ in found], time.time(), jobs.problem), sys.stdout, indent=1)
        print()
    else:
        console = Console(highlight=False)
        console.print(_screen(found, jobs.problem, console))
    return 1 if jobs.problem else 0


def _screen(found: Sequence[tuple[JobView, Story]], problem: str, console: Console) -> RenderableType:
    parts: list[RenderableType] = [Text(problem, "bold red")] if problem else []
    if len(found) == 1:
        return Group(*parts, status.card(found[0][0]))
    if not found:
        return Group(*parts, "no job that is not over; elastic-hpc status --all shows the others")
    return Group(*parts, status.table([view for view, _ in found], console.width))


def _watch(jobs: Jobs, args: argparse.Namespace) -> int:
    console = Console(highlight=False)

    with contextlib.suppress(KeyboardInterrupt):
        found = jobs.look()
        with Live(
            _screen(found, jobs.problem, console), console=console, screen=console.is_terminal, auto_refresh=False
        ) as live:
            while not all(view.over for view, _ in found):
                time.sleep(_LOOK)
                found = jobs.look(_ASK_SLURM)
                if not (args.job or args.all):
                    found = [(view, story) for view, story in found if of_interest(view, story)]
                live.update(_screen(found, jobs.problem, console), refresh=True)
        if console.is_terminal:
            console.print(_screen(found, jobs.problem, console))
    return 1 if jobs.problem else 0
