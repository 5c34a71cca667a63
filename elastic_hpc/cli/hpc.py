"""``elastic-hpc``: everything that is done with a job after it was submitted."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from elastic_hpc import __version__, slurm
from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job
from elastic_hpc.job.handle import Job
from elastic_hpc.job.lookup import expand
from elastic_hpc.options.sbatch import WarningSignal
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import job_name

MODULES: tuple[str, ...] = ("status", "logs", "why", "timeline", "metrics", "doctor", "rehearse")
"""Commands with a module of their own: ``elastic_hpc.cli.NAME`` has HELP, EPILOG, add_arguments(parser) and
run(args), which returns the exit code."""
_HERE = ("drain", "stop")
_INTERNAL = ("conclude", "conclude-alone", "warned")
"""Commands for batch scripts and agents, which no help lists."""


def parser(only: str = "") -> argparse.ArgumentParser:
    """``only``: the command that is called, if it is one; what the others need is not imported."""
    parser = argparse.ArgumentParser(
        prog="elastic-hpc",
        description="Look at elastic jobs, or tell them something. JOB is a job's id, or its run directory, for "
        "example elastic-logs/4711. elastic-hpc COMMAND --help has more.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in () if only in _HERE + _INTERNAL else (only,) if only in MODULES else MODULES:
        module = importlib.import_module(f"elastic_hpc.cli.{name}")
        added = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(added)
        added.set_defaults(run=module.run)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_job(added)
        added.set_defaults(run=_run)
        return added

    if only in _INTERNAL:
        conclude = command("conclude", "act on a job's verdict; the last line of the batch script")
        conclude.add_argument("status", type=int, help="exit code of srun")
        conclude.add_argument("--signal", metavar="NAME", default=WarningSignal.name, help="the warning signal")
        alone = command("conclude-alone", "act on a verdict where the batch script was lost; an agent calls")
        alone.add_argument("outcome", help="finished, failed or requeue")
        alone.add_argument("--deputy-of", metavar="NODE", help="act only if the one on NODE is lost")
        command("warned", "tell the leader of Slurm's warning to this run; the batch script calls")
        return parser
    command("drain", "have a running job save, stop and return through the queue, as before its time limit")
    stop = command("stop", "end a job, running or waiting in the queue: it does not come back")
    stop.add_argument(
        "--after-checkpoint", action="store_true", help="let the workers save first; they have as long as --grace says"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    rundir: RunDir = args.job
    if args.command.startswith("conclude"):
        from elastic_hpc.agent import conclude

        if args.command == "conclude":
            return conclude.conclude(rundir, os.environ, args.status, warning=args.signal)
        return conclude.conclude_alone(rundir, os.environ, args.outcome, deputy_of=args.deputy_of)
    if args.command == "stop":
        return _stop(Job(rundir.path), after_checkpoint=args.after_checkpoint)
    if args.command == "warned":
        from elastic_hpc.agent import warned

        warned.pass_on(rundir, os.environ)
        return 0
    reason = slurm.warning_reason(job_name(os.environ)) if "SLURM_JOB_ID" in os.environ else "user"
    tasks = [Job(path) for path in expand(rundir.path)]
    for job in [task for task in tasks if not task.final_state()] or tasks:
        job.drain(reason)
    return 0


def _stop(job: Job, *, after_checkpoint: bool) -> int:
    """A job that is over already is no failure: it is what the user wants."""
    done = job.stop(after_checkpoint=after_checkpoint)
    if done == "over":
        status = job.status()
        print(f"job {job.id} is over already, {status.state}" + (f": {status.reason}" if status.reason else ""))
    elif done == "cancelled":
        print(f"job {job.id} is cancelled")
    else:
        print(
            f"job {job.id}: its leader was told to stop it"
            + (", the workers may save first" if after_checkpoint else "")
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 1 for a failure, 2 for bad input."""
    given = sys.argv[1:] if argv is None else argv

    def work() -> int:
        args = parser(given[0] if given else "").parse_args(given)
        return int(args.run(args))

    return entry.run("elastic-hpc", work, output_counts=given[:1] not in [[name] for name in _INTERNAL])
