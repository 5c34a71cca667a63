"""``elastic-hpc``: everything that a user does with a job after its submission."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from elastic_hpc import __version__, slurm
from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job, single
from elastic_hpc.cli.manual import EXIT_CODES, PLAIN, Layout
from elastic_hpc.errors import ArgumentError, UsageError, did_you_mean
from elastic_hpc.job.handle import Job
from elastic_hpc.job.lookup import expand
from elastic_hpc.options.sbatch import WarningSignal
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import job_name

MODULES: tuple[str, ...] = (
    *("status", "logs", "why", "timeline", "serve", "metrics"),
    *("shell", "stop", "clean", "notice", "plan", "config", "doctor", "rehearse"),
)
"""Commands with a module of their own: ``elastic_hpc.cli.NAME`` has HELP, EPILOG, perhaps EXCEPTIONS to the
usual exit codes, add_arguments(parser) and run(args), which returns the exit code."""
_ALIASES = {"cancel": "stop", "list": "status"}
_OTHERS = {"attach": "to follow a job's output: elastic-hpc logs JOB -f; for a shell there: elastic-hpc shell JOB"}
"""What to type instead of commands that other tools have."""
_HERE = ("drain", "resize", "release")
_DRAIN = """\
example:
  elastic-hpc drain 4711
"""
_RESIZE = """\
examples:
  elastic-hpc resize 4711 2:6      MIN 2, MAX 6
  elastic-hpc resize 4711 4        4 nodes, neither more nor fewer

At a step boundary, the job returns nodes beyond MAX to Slurm; the workers on the other nodes continue. With --grow,
the job requests more nodes at once, without --grow at its next requeue. Nodes that leave do not count against
--max-restarts; nodes that come do, unless --free-growth is given. The new bounds persist over requeues.
"""
_RELEASE = """\
example:
  elastic-hpc release 4711 n17 n18

elastic-hpc refuses to release the job's first node or the leader's node, or to leave fewer than MIN nodes.
"""
_INTERNAL = ("conclude", "conclude-alone", "warned", "inside")
"""Commands for batch scripts and agents, which no help lists."""


class _OneLineParser(argparse.ArgumentParser):
    """Its errors are one line, as in elastic-sbatch and elastic-srun. As these, it accepts no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=Layout, **PLAIN, **settings)
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        version = f"elastic-hpc {__version__}"
        self.add_argument("-V", "--version", action="version", version=version, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        message = re.sub("^the following arguments are required: ([^,]+).*", r"expected \1", message)
        message = re.sub(r"^one of the arguments (\S+) (\S+) is required", r"expected \1 or \2", message)
        if option := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+): (.*)", message):
            flag, said = option.groups()
            if lacks := re.fullmatch(r"expected (one|\d+) arguments?", said):
                shown = self._get_formatter()._format_action_invocation(self._option_string_actions[flag])  # noqa: SLF001
                values = "a value" if lacks[1] == "one" else f"{lacks[1]} values"
                raise UsageError(f"{flag}: expected {values}: {shown.rpartition(', ')[2]}")
            if other := re.fullmatch(r"not allowed with argument (?:-\w/)?(--[\w-]+)", said):
                raise UsageError(f"{other[1]} with {flag}: expected one of them")
            if value := re.fullmatch(r"ignored explicit argument '(.*)'", said):
                raise UsageError(f"{flag}={value[1]}: expected no value, for example {flag}")
        usage = " ".join(self.format_usage().split())
        raise UsageError(f"{message.removeprefix('argument ')}; {usage}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments here: the parser of all commands would not know the options of this command."""
        try:
            namespace, others = super().parse_known_args(args, namespace)
        except (UsageError, ArgumentError):
            others = [] if self._subparsers else self._unknown(args)
            if not others:
                raise
        if others and not others[0].startswith("-"):
            self.error(f"{others[0]!r}: unexpected argument")
        if others:
            flag = others[0].partition("=")[0]
            hint = did_you_mean(flag, self._option_string_actions, 0.75) or f"{self.prog} --help lists all options"
            raise UsageError(f"{flag}: unknown option; {hint}")
        return namespace, others

    def _unknown(self, args: Any) -> list[str]:
        """The unknown options among the refused ``args``: the parser may read the value of such an option as JOB."""
        for action in self._actions:
            action.required, action.type = False, None
        for group in self._mutually_exclusive_groups:
            group.required = False
        return [word for word in super().parse_known_args(args)[1] if word.startswith("-")]


def parser(only: str = "") -> argparse.ArgumentParser:
    """``only``: the command to call, if it exists; the modules of the other commands are then not imported."""
    parser = _OneLineParser(
        prog="elastic-hpc",
        description="Monitor and control elastic jobs. JOB is a job ID, or a run directory, for "
        "example elastic-logs/4711. For details: elastic-hpc COMMAND --help.",
        epilog=f"{EXIT_CODES} Some commands have others; see their help.",
    )
    only = _ALIASES.get(only, only)
    commands = parser.add_subparsers(prog="elastic-hpc", dest="command", required=True, metavar="COMMAND")
    for name in () if only in _HERE + _INTERNAL else (only,) if only in MODULES else MODULES:
        module = importlib.import_module(f"elastic_hpc.cli.{name}")
        added = commands.add_parser(
            name,
            aliases=[alias for alias, command in _ALIASES.items() if command == name],
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"{module.EPILOG.strip()}\n\n{EXIT_CODES} {getattr(module, 'EXCEPTIONS', '')}".strip(),
        )
        module.add_arguments(added)
        added.set_defaults(run=module.run)

    def command(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"{epilog}\n{EXIT_CODES}",
        )
        add_job(added)
        added.set_defaults(run=_run)
        return added

    if only in _INTERNAL:
        conclude = command("conclude", "act on a job's verdict; the last line of the batch script")
        conclude.add_argument("status", type=int, help="exit code of srun")
        conclude.add_argument("--signal", metavar="NAME", default=WarningSignal.name, help="the warning signal")
        conclude.add_argument("--max-requeues", type=int, default=LaunchSpec.max_requeues, help="the job's own")
        alone = command("conclude-alone", "act on a verdict where the batch script was lost; an agent calls")
        alone.add_argument("outcome", help="finished, failed or requeue")
        alone.add_argument("--deputy-of", metavar="NODE", help="act only if the one on NODE is lost")
        alone.add_argument("--unless-led", action="store_true", help="act only if no leader is at work by then")
        inside = command(
            "inside", "run a command in the environment of the agent of this node; elastic-hpc shell calls"
        )
        inside.add_argument("words", nargs=argparse.REMAINDER, help="the command; empty for a shell")
        command("warned", "report Slurm's warning to this run's leader; the batch script calls")
        return parser
    command("drain", "let a running job save, stop and requeue itself, as before its time limit", _DRAIN)
    resize = command("resize", "change MIN and MAX of a job", _RESIZE)
    resize.add_argument("nodes", metavar="NODES", help="N, MIN:MAX or exact numbers, as for --nodes: 2:6, or 4,6,8")
    release = command("release", "return nodes of a running job to Slurm, at a step boundary", _RELEASE)
    release.add_argument("nodes", metavar="NODE", nargs="+", help="Slurm's name of a node of the job")
    return parser


def _check_command(argv: Sequence[str]) -> None:
    """Raise UsageError unless ``argv`` begins with a command, or requests help or the version."""
    commands = (*MODULES, *_HERE, *_ALIASES)
    first = argv[0] if argv else ""
    if first in (*commands, *_INTERNAL, "-h", "--help", "-V", "--version"):
        return
    if not first:
        raise UsageError("expected a command, for example elastic-hpc status; elastic-hpc --help lists all commands")
    hint = _OTHERS.get(first) or did_you_mean(first, commands) or "elastic-hpc --help lists all commands"
    raise UsageError(f"{first}: unknown {'option' if first.startswith('-') else 'command'}; {hint}")


def _run(args: argparse.Namespace) -> int:
    rundir: RunDir = args.job
    if args.command.startswith("conclude"):
        from elastic_hpc.agent import conclude

        if args.command == "conclude":
            return conclude.conclude(
                rundir, os.environ, args.status, warning=args.signal, max_requeues=args.max_requeues
            )
        return conclude.conclude_alone(
            rundir, os.environ, args.outcome, deputy_of=args.deputy_of, unless_led=args.unless_led
        )
    if args.command in {"resize", "release"}:
        job = Job(single(args.command, rundir).path)
        answer = job.resize(args.nodes) if args.command == "resize" else job.release(*args.nodes)
        done = f"may have {args.nodes} nodes" if args.command == "resize" else f"releases {', '.join(args.nodes)}"
        print(f"job {job.id} {done}" + (f"; {answer}" if answer else ""))
        return 0
    if args.command == "inside":
        from elastic_hpc.agent import beside

        beside.enter(str(rundir.path), args.words)
    if args.command == "warned":
        from elastic_hpc.agent import warned

        warned.pass_on(rundir, os.environ)
        return 0
    reason = slurm.warning_reason(job_name(os.environ)) if "SLURM_JOB_ID" in os.environ else "user"
    tasks = [Job(path) for path in expand(rundir.path)]
    for job in [task for task in tasks if not task.final_state()] or tasks:
        job.drain(reason)
        # a job of elastic-srun has no queue to return to
        then = "returns to the queue" if (job.run_dir / "script.sbatch").exists() else "ends"
        print(f"job {job.id}: the workers are asked to save, then the job {then}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 1 for a failure, 2 for bad input."""
    given = sys.argv[1:] if argv is None else argv

    def work() -> int:
        argv, command = given, list[str]()
        if given[:1] == ["shell"] and "--" in given:  # NODE may be missing before it, options may follow it
            argv, command = given[: given.index("--")], given[given.index("--") + 1 :]
        if given[:1] == ["plan"]:  # its options are those of elastic-sbatch
            from elastic_hpc.cli import plan

            argv = ["plan", *plan.arranged(given[1:])]
        _check_command(given)
        args = parser(given[0]).parse_args(argv)
        if command:
            args.command_line += command
        return int(args.run(args))

    with contextlib.ExitStack() as stack:
        if given[:1] in [[name] for name in _INTERNAL]:  # such a command acts even if its messages cannot be written
            from elastic_hpc.agent.log import Stderr

            stack.enter_context(contextlib.redirect_stderr(Stderr()))
        return entry.run("elastic-hpc", work)
