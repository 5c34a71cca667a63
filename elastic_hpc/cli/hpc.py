"""``elastic-hpc``: everything that is done with a job after it was submitted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from elastic_hpc.env import job_name, run_number
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.rundir import RunDir


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-hpc",
        description="Look at an elastic job, or tell it something. RUN_DIR is the job's folder under "
        "--log-dir, for example elastic-logs/4711.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("run_dir", metavar="RUN_DIR", type=_run_dir)
        return added

    command("summary", "show the rounds of a job: world sizes, causes, and what each restart cost")
    command("drain", "have a running job stop and return through the queue, as before its time limit")
    command("stop", "end a running job: it does not come back")
    conclude = command("conclude", "act on a job's verdict; the last line of the batch script")
    conclude.add_argument("status", type=int, help="exit code of srun")
    return parser


def _run_dir(text: str) -> RunDir:
    if not Path(text).is_dir():
        raise UsageError(f"{text!r}: expected the run directory of a job, for example elastic-logs/4711")
    return RunDir(text)


def _run(args: argparse.Namespace) -> int:
    rundir: RunDir = args.run_dir
    if args.command == "conclude":
        from elastic_hpc.conclude import conclude

        job = job_name(os.environ) if "SLURM_JOB_ID" in os.environ else ""
        return conclude(rundir, job, run_number(os.environ), args.status)
    if args.command == "summary":
        from rich.console import Console

        from elastic_hpc.summary import render

        Console().print(render(rundir.events()))
        verdict = rundir.read("verdict.json")
        print(f"{verdict['outcome']}: {verdict['reason']}" if verdict else "no verdict yet")
        return 0
    from elastic_hpc.ask import ask_leader

    ask_leader(rundir, args.command)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; the answer is the exit code: 0, 1 for a failure, 2 for bad input."""
    try:
        return _run(_parser().parse_args(argv))
    except ElasticError as error:
        print(f"elastic-hpc: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
