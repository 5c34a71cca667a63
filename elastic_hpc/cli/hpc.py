"""``elastic-hpc``: everything that is done with a job after it was submitted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from elastic_hpc.election import joiner
from elastic_hpc.env import JOIN, job_name
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.rundir import RunDir


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-hpc",
        description="Look at an elastic job, or tell it something. JOB is its id, if ./elastic-logs has it, or its "
        "folder under --log-dir, for example elastic-logs/4711.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("run_dir", metavar="JOB", type=_run_dir)
        return added

    command("summary", "show the rounds of a job: world sizes, causes, and what each restart cost")
    command("drain", "have a running job save, stop and return through the queue, as before its time limit")
    stop = command("stop", "end a job, running or waiting in the queue: it does not come back")
    stop.add_argument(
        "--after-checkpoint", action="store_true", help="let the workers save first; they have as long as --grace says"
    )
    conclude = command("conclude", "act on a job's verdict; the last line of the batch script")
    conclude.add_argument("status", type=int, help="exit code of srun")
    conclude.add_argument("--signal", metavar="NAME", default="USR2", help="the job's warning signal (default: USR2)")
    alone = command("conclude-alone", "act on a job's verdict where the batch script was lost; started by an agent")
    alone.add_argument("outcome", help="finished, failed or requeue")
    alone.add_argument("--deputy-of", metavar="NODE", help="act only if the one on NODE is lost")
    return parser


def _run_dir(text: str) -> RunDir:
    found = next((path for path in (Path(text), Path("elastic-logs", text)) if path.is_dir()), None)
    if not text or found is None:
        raise UsageError(
            f"{text!r}: expected a job's id, where ./elastic-logs has it, or its run directory, "
            "for example elastic-logs/4711"
        )
    return RunDir(found)


def _run(args: argparse.Namespace) -> int:
    rundir: RunDir = args.run_dir
    if args.command.startswith("conclude"):
        from elastic_hpc import conclude

        if args.command == "conclude":
            return conclude.conclude(rundir, os.environ, args.status, warning=args.signal)
        return conclude.conclude_alone(rundir, os.environ, args.outcome, deputy_of=args.deputy_of)
    if args.command == "summary":
        from rich.console import Console

        from elastic_hpc.summary import render

        Console().print(render(rundir.events()))
        verdict = rundir.read("verdict.json")
        print(f"{verdict['outcome']}: {verdict['reason']}" if verdict else "no verdict yet")
        return 0
    if args.command == "drain":
        _drain(rundir)
        return 0
    from elastic_hpc.job import Job

    job = Job(rundir.path)
    if job.stop(after_checkpoint=args.after_checkpoint):
        print(f"job {job.id} was waiting in the queue and is cancelled")
    return 0


def _drain(rundir: RunDir) -> None:
    """For the whole job; in the batch script of a joiner, which Slurm has warned, for its node alone."""
    from elastic_hpc.ask import ask_leader, ask_to_leave

    if JOIN in os.environ:
        ask_to_leave(rundir, joiner(os.environ["SLURM_JOB_ID"]), _why_drained())
    else:
        ask_leader(rundir, "drain", _why_drained())


def _why_drained() -> str:
    """The batch script calls when Slurm warns it."""
    if "SLURM_JOB_ID" not in os.environ:
        return "user"
    from elastic_hpc import slurm

    try:
        return "preempted" if slurm.show_job(job_name(os.environ)).preempt_time else "time limit"
    except ElasticError:
        return "time limit"


def main(argv: list[str] | None = None) -> int:
    """Entry point; the answer is the exit code: 0, 1 for a failure, 2 for bad input."""
    try:
        return _run(_parser().parse_args(argv))
    except ElasticError as error:
        print(f"elastic-hpc: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
