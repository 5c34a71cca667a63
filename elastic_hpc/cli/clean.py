"""``elastic-hpc clean``: removes what jobs that ended long ago have left."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta

from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job
from elastic_hpc.errors import UsageError, argument
from elastic_hpc.job import cleaning
from elastic_hpc.job.lookup import select
from elastic_hpc.job.quoting import comment
from elastic_hpc.options import durations
from elastic_hpc.view.times import clock

HELP = "remove the run directories of jobs that ended long ago, and code copies of jobs that never started; asks first"
EPILOG = """examples:
  elastic-hpc clean --dry-run     what would be removed
  elastic-hpc clean --older-than 90d
  elastic-hpc clean 4711 4712     these jobs, whenever they ended
  elastic-hpc clean --yes         without asking, for example from cron

elastic-hpc clean keeps the run directories of active jobs and of other users, links, and run directories in which the
script has saved checkpoints or other files of its own. Without its run directory, a job has no status, logs or why, and
cannot be resumed."""

_DEFAULT = "30d"
_NAMES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "*")
    parser.add_argument(
        "--older-than",
        metavar="TIME",
        type=argument(_older_than),
        help=f"only jobs that ended that long ago: 12h, 90d (default: {_DEFAULT}; a JOB that you name: no limit)",
    )
    parser.add_argument(
        "--with-checkpoints",
        action="store_true",
        help="also remove run directories with checkpoints or other files of the script",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _older_than(text: str) -> timedelta:
    try:
        return durations.parse(text)
    except UsageError as error:
        raise UsageError(f"--older-than {error}") from None


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 if a folder could not be removed."""
    if not (args.dry_run or args.yes or sys.stdin.isatty()):
        raise UsageError("there is no terminal to ask on; expected --yes to remove without a question, or --dry-run")
    older_than = args.older_than or (timedelta(0) if args.job else durations.parse(_DEFAULT))
    before = time.time() - older_than.total_seconds()
    how = {"named": bool(args.job), "with_files": args.with_checkpoints}
    found = cleaning.inventory(select(args.job), before, **how)
    _show(found)
    if args.dry_run or not found.leftovers or not (args.yes or _agreed()):
        return 0
    code = removed = 0
    for leftover in found.leftovers:
        try:  # looks again: a job may be resumed while others are removed
            cleaning.remove(leftover, before, **how)
            removed += 1
        except OSError as error:
            where = comment(str(error.filename or leftover.path))
            entry.tell("elastic-hpc", f"{where}: {error.strerror}: not removed")
            code = 1
    print(f"removed: {removed} of {len(found.leftovers)}")
    return code


def _show(found: cleaning.Inventory) -> None:
    total = 0
    for leftover in sorted(found.leftovers, key=lambda leftover: leftover.ended):
        total += (size := leftover.size())
        files = f"  (with {_names(leftover.files)})" if leftover.files else ""
        where = comment(str(leftover.path))
        print(f"{_bytes(size):>9}  {leftover.state:<10}  {clock(leftover.ended)[:10]}  {where}{files}")
    count = len(found.leftovers)
    print(f"to be removed: {count} folder{'s' * (count > 1)}, {_bytes(total)}" if count else "nothing to remove")
    for reason, names in found.kept.items():
        print(f"kept: {len(names)} {reason}: {_names(names)}")


def _names(names: list[str] | tuple[str, ...]) -> str:
    return " ".join(map(comment, names[:_NAMES])) + (" ..." if len(names) > _NAMES else "")


def _bytes(count: float) -> str:
    for unit in ("KB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "KB" else f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def _agreed() -> bool:
    try:
        return input("Remove them permanently? [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:
        return False
