"""``elastic-hpc status``: how one's jobs are."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job
from elastic_hpc.errors import UsageError
from elastic_hpc.job.look import Jobs, Look
from elastic_hpc.job.lookup import expand
from elastic_hpc.record.registry import known
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view import status
from elastic_hpc.view.job import as_json

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
    add_job(parser, "*")
    parser.epilog = _EPILOG
    parser.add_argument("--all", action="store_true", help="also jobs that ended more than a day ago")
    parser.add_argument("--watch", action="store_true", help="show it live, until all have ended, or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON object, described in docs/status.md")


def chosen(asked: Sequence[RunDir]) -> list[RunDir]:
    """Those that were asked for, of arrays the tasks that have started; else all jobs of mine that are known: submitted
    lately, or in ./elastic-logs.
    """
    if asked:
        return [RunDir(path) for rundir in asked for path in expand(rundir.path)]
    here = [path for path in Path("elastic-logs").glob("*") if (path / "spec.json").exists()]
    paths = dict.fromkeys(
        [*known(), *sorted((path.absolute() for path in here), key=lambda path: (len(path.name), path.name))]
    )
    return [RunDir(path) for path in paths]


def of_interest(look: Look) -> bool:
    """Whether it is not over, or has ended lately."""
    view, story = look.view, look.story
    if view.state == "UNKNOWN" and view.over and not story.runs and not view.script:
        return False  # it never started, and is gone
    return not view.over or time.time() - (story.last_time or _mtime(view.run_dir)) < _LATELY


def _mtime(path: str) -> float:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0


def run(args: argparse.Namespace) -> int:
    """The command; the answer is its exit code: 1 if Slurm could not be asked."""
    if args.watch and args.json:
        raise UsageError("--watch and --json: expected one of them; call --json again and again instead")
    jobs = Jobs(chosen(args.job))
    if args.watch:
        return _watch(jobs, args)
    found = _wanted(jobs.look(), args)
    if args.json:
        print(json.dumps(as_json([look.view for look in found], time.time(), jobs.problem), indent=1))
    else:
        console = Console(highlight=False)
        console.print(_screen(found, jobs.problem, console))
    return 1 if jobs.problem else 0


def _wanted(found: Sequence[Look], args: argparse.Namespace) -> list[Look]:
    return [look for look in found if args.job or args.all or of_interest(look)]


def _screen(found: Sequence[Look], problem: str, console: Console) -> RenderableType:
    parts: list[RenderableType] = [Text(problem, "bold red")] if problem else []
    if len(found) == 1:
        return Group(*parts, status.card(found[0].view))
    if not found:
        return Group(*parts, "no job that is not over; elastic-hpc status --all shows the others")
    return Group(*parts, status.table([look.view for look in found], console.width))


def _watch(jobs: Jobs, args: argparse.Namespace) -> int:
    console = Console(highlight=False)

    with contextlib.suppress(KeyboardInterrupt):
        found = _wanted(jobs.look(), args)
        with Live(
            _screen(found, jobs.problem, console), console=console, screen=console.is_terminal, auto_refresh=False
        ) as live:
            while not all(look.view.over for look in found):
                entry.heed_reader()
                time.sleep(_LOOK)
                found = _wanted(jobs.look(_ASK_SLURM), args)
                live.update(_screen(found, jobs.problem, console), refresh=True)
        if console.is_terminal:
            console.print(_screen(found, jobs.problem, console))
    return 1 if jobs.problem else 0
