"""``elastic-hpc status``: the state of jobs."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job
from elastic_hpc.errors import UsageError
from elastic_hpc.job.look import Jobs, Look
from elastic_hpc.job.lookup import select
from elastic_hpc.view import status
from elastic_hpc.view.job import as_json

HELP = "show how my jobs are: nodes, round, restarts, progress, time lost"
EPILOG = """examples:
  elastic-hpc status                    all jobs that are not over, and those that ended within a day
  elastic-hpc status 4711               one job, in detail
  elastic-hpc status 4711 --watch       until it ends, or Ctrl-C
  elastic-hpc status --json | jq '.jobs[] | select(.state == "RUNNING") | .goodput'

A state of UNKNOWN means what it says: Slurm could not be asked, or does not know the job, and its record has no end."""

_LOOK_INTERVAL, _SLURM_INTERVAL = 1.0, 10.0  # seconds between two looks, and two queries of Slurm, of --watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "*")
    parser.add_argument("--all", action="store_true", help="also jobs that ended more than a day ago")
    parser.add_argument("--watch", action="store_true", help="show it live, until all have ended, or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON object, described in docs/status.md")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if Slurm could not be asked."""
    if args.watch and args.json:
        raise UsageError("--watch and --json: expected one of them; call --json again and again instead")
    selected = select(args.job)
    jobs = Jobs(selected)
    if args.watch:
        return _watch(jobs, args)
    looks = _wanted(jobs.look(ends=len(selected) == 1), args)
    if args.json:
        print(json.dumps(as_json([look.view for look in looks], time.time(), jobs.problem), indent=1))
    else:
        console = Console(highlight=False)
        console.print(_screen(looks, jobs.problem, console))
    return 1 if jobs.problem else 0


def _wanted(looks: Sequence[Look], args: argparse.Namespace) -> list[Look]:
    return [look for look in looks if args.job or args.all or look.is_recent()]


def _screen(looks: Sequence[Look], problem: str, console: Console) -> RenderableType:
    parts: list[RenderableType] = [Text(problem, "bold red")] if problem else []
    if len(looks) == 1:
        return Group(*parts, status.card(looks[0].view))
    if not looks:
        return Group(*parts, "no job that is not over; elastic-hpc status --all shows the others")
    return Group(*parts, status.table([look.view for look in looks], console.width))


def _watch(jobs: Jobs, args: argparse.Namespace) -> int:
    console = Console(highlight=False)

    with contextlib.suppress(KeyboardInterrupt):
        looks = _wanted(jobs.look(), args)
        with Live(
            _screen(looks, jobs.problem, console), console=console, screen=console.is_terminal, auto_refresh=False
        ) as live:
            while not all(look.view.over for look in looks):
                entry.heed_reader()
                time.sleep(_LOOK_INTERVAL)
                looks = _wanted(jobs.look(_SLURM_INTERVAL), args)
                live.update(_screen(looks, jobs.problem, console), refresh=True)
        if console.is_terminal:
            console.print(_screen(looks, jobs.problem, console))
    return 1 if jobs.problem else 0
