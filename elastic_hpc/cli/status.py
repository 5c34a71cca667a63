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

from elastic_hpc.cli import entry, screen
from elastic_hpc.cli.jobs import add_job
from elastic_hpc.errors import UsageError
from elastic_hpc.job.look import Jobs, Look, may_be_recent
from elastic_hpc.job.lookup import select
from elastic_hpc.view import status
from elastic_hpc.view.job import as_json

HELP = "show the state of your jobs: nodes, round, restarts, progress, lost time"
EPILOG = """examples:
  elastic-hpc status                  active jobs, and those of the last day
  elastic-hpc status 4711             one job, in detail
  elastic-hpc status 4711 --watch     update until the job ends, or Ctrl-C
  elastic-hpc status --json | jq '.jobs[] | {id, state, goodput}'

State UNKNOWN: Slurm does not answer or does not know the job, and the job's record has no end."""
EXCEPTIONS = "Code 1 also means that Slurm does not answer."

_LOOK_INTERVAL, _SLURM_INTERVAL = 1.0, 10.0  # seconds between two looks, and two queries of Slurm, of --watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "*")
    parser.add_argument("--all", action="store_true", help="include jobs that ended more than a day ago")
    parser.add_argument("--watch", action="store_true", help="update the screen until all jobs have ended, or Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON object, described in docs/status.md")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if Slurm did not answer, or the record of a job could not be read."""
    if args.watch and args.json:
        raise UsageError("--watch with --json: expected one of them; call --json repeatedly instead")
    selected = [rundir for rundir in select(args.job) if args.job or args.all or may_be_recent(rundir)]
    jobs = Jobs(selected, also_unreadable=not args.job)
    if args.watch:
        return _watch(jobs, args)
    looks = _wanted(jobs.look(ends=len(selected) == 1), args)
    if args.json:
        print(json.dumps(as_json([look.view for look in looks], time.time(), jobs.problem), indent=1))
    else:
        console = screen.console()
        screen.show(console, _screen(looks, jobs.problem, console))
    return _code(jobs, looks)


def _code(jobs: Jobs, looks: Sequence[Look]) -> int:
    return int(bool(jobs.problem) or any(look.view.run_dir in jobs.unreadable for look in looks))


def _wanted(looks: Sequence[Look], args: argparse.Namespace) -> list[Look]:
    return [look for look in looks if args.job or args.all or look.is_recent()]


def _screen(looks: Sequence[Look], problem: str, console: Console) -> RenderableType:
    parts: list[RenderableType] = [Text(problem, "bold red")] if problem else []
    if len(looks) == 1:
        return Group(*parts, status.card(looks[0].view))
    if not looks:
        return Group(*parts, "No active jobs (--all shows finished ones)")
    ordered = sorted(looks, key=lambda look: look.place)
    return Group(*parts, status.table([look.view for look in ordered], console.width))


def _watch(jobs: Jobs, args: argparse.Namespace) -> int:
    console = screen.console()
    looks: list[Look] | None = None
    with contextlib.suppress(KeyboardInterrupt):
        looks = _wanted(jobs.look(), args)
        first = _screen(looks, jobs.problem, console)
        with Live(first, console=console, screen=console.is_terminal, transient=True, auto_refresh=False) as live:
            while not all(look.view.over for look in looks):
                entry.end_without_reader()
                time.sleep(_LOOK_INTERVAL)
                looks = _wanted(jobs.look(_SLURM_INTERVAL), args)
                live.update(_screen(looks, jobs.problem, console), refresh=True)
    if looks is not None:
        screen.show(console, _screen(looks, jobs.problem, console))
    return _code(jobs, looks or [])
