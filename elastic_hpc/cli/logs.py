"""``elastic-hpc logs``: what the workers wrote."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import deque
from collections.abc import Container, Iterable

from rich.console import Console
from rich.text import Text

from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job, nothing_to_show, single
from elastic_hpc.errors import ElasticError, UsageError, argument, of_option
from elastic_hpc.job.look import JobRecord, Jobs
from elastic_hpc.membership.nodes import NumberRanges, name_matcher
from elastic_hpc.options import moments
from elastic_hpc.options.values import count
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import LogLine, Logs, Stream, Wanted, summary
from elastic_hpc.view.story import Round
from elastic_hpc.view.times import clock
from elastic_hpc.view.times import count as count_of

HELP = "show the workers' output, sorted by time over all ranks and rounds"
EPILOG = """examples:
  elastic-hpc logs 4711                 output of rank 0, stderr of all ranks
  elastic-hpc logs 4711 -f              follow the output until the job ends
  elastic-hpc logs 4711 --rank 0-3,8    all output of these ranks
  elastic-hpc logs 4711 --round 2 --node 'n[3-4]' --stderr
  elastic-hpc logs 4711 -t -n 100 --rank all
  elastic-hpc logs 4711 --since 10m     the output of the last ten minutes
  elastic-hpc logs 4711 -f --rank all --grep '(?i)warn|error'

Lines of different ranks are sorted by the time at which an agent read them, up to a tenth of a second after the worker
wrote them. With -f, lines appear about a second later; restarts and requeues do not end it."""
EXCEPTIONS = "Code 1 also means that no line matches the options."

_LOOK_INTERVAL, _STATE_INTERVAL = 0.3, 5.0
_PER_FILE = 0.001
"""Seconds per file between two rounds of reading, because each round opens all files."""

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="show new output as it appears, until the job ends")
    parser.add_argument("--rank", metavar="R", help="show only the output of these ranks: 3, 0-7, 0,8, or all")
    parser.add_argument(
        "--node",
        metavar="N",
        action="append",
        help="show only the output of these nodes, in Slurm's notation: n3, 'n[10-12]', 'gpu*'; may be repeated",
    )
    parser.add_argument("--round", metavar="K", help="show only the output of these rounds: 2, 2-4, or last")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stdout", action="store_true", help="show only stdout")
    which.add_argument("--stderr", action="store_true", help="show only stderr")
    parser.add_argument(
        "--since",
        metavar="TIME|DURATION",
        type=argument(_since),
        help="show only lines from then on: 10m, 2h or 1d ago, 21:44, 2026-11-28 or 2026-11-28T21:44",
    )
    parser.add_argument(
        "--grep",
        metavar="REGEX",
        type=argument(_pattern),
        help="show only lines in which REGEX, as in Python's re, is found; (?i) at its start ignores case",
    )
    parser.add_argument(
        "-n", "--lines", metavar="N", type=argument(of_option("--lines", count)), help="show only the last N lines"
    )
    parser.add_argument("-t", "--timestamps", action="store_true", help="show the time of each line")


def run(args: argparse.Namespace) -> int:
    rundir = single("logs", args.job)
    wanted, printer = _wanted(args, rundir), _Printer(rundir, timestamps=args.timestamps)
    logs = Logs(rundir.path / "logs", wanted)
    lines: Iterable[LogLine] = logs.written(follow=args.follow)
    printer.print(lines if args.lines is None else deque(lines, maxlen=args.lines))
    if args.follow:
        _follow(rundir, logs, printer)
    if not printer.printed and args.lines != 0:
        _explain_nothing_shown(args, rundir)
    return 0


def _follow(rundir: RunDir, logs: Logs, printer: _Printer) -> None:
    jobs, last_look, last_summary = Jobs([rundir]), float("-inf"), ""
    while True:
        over = False
        if time.monotonic() - last_look > _STATE_INTERVAL:
            last_look = time.monotonic()
            ((view, *_),) = jobs.look()
            over = view.over
            if view.state != "RUNNING" and view.summary != last_summary:
                entry.tell("elastic-hpc", "\n  ".join((f"job {view.id} is {view.summary}", *view.advice)))
            elif view.state == "RUNNING" and not last_summary and not printer.printed:
                entry.tell("elastic-hpc", f"job {view.id} is {view.summary}; there is no line to show yet")
            last_summary = view.summary
        printer.print(logs.added())
        if over:
            printer.print(logs.rest())
            return
        entry.end_without_reader()
        time.sleep(max(_LOOK_INTERVAL, logs.size * _PER_FILE))


def _since(text: str) -> float:
    try:
        return moments.parse(text, time.time())
    except UsageError as error:
        raise UsageError(f"--since {error}") from None


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--grep {text!r}: expected a regular expression of Python; {error}") from None


def _explain_nothing_shown(args: argparse.Namespace, rundir: RunDir) -> None:
    """Raise ElasticError if no line matches the options or there are no logs."""
    options = {"--rank": args.rank, "--node": ",".join(args.node or ()), "--round": args.round}
    given = [f"{name} {value}" for name, value in options.items() if value]
    given += [f"--{name}" for name in ("stdout", "stderr") if getattr(args, name)]
    existing = summary(rundir.path / "logs")
    if existing and (args.grep or args.since is not None):
        since = "" if args.since is None else f"--since {clock(args.since)}"
        grep = f"--grep {args.grep.pattern!r}" if args.grep else ""
        raise ElasticError(f"{' '.join(filter(None, [since, grep, *given]))}: no such line; the logs have {existing}")
    if given and existing:
        raise ElasticError(f"{' '.join(given)}: nothing was written there; the logs have {existing}")
    if existing:
        entry.tell("elastic-hpc", f"rank 0 wrote nothing, and no rank wrote to stderr; the logs have {existing}")
        return
    (look,) = Jobs([rundir]).look()
    if look.story.rounds:
        entry.tell("elastic-hpc", f"the workers of job {look.view.id} have written nothing; it is {look.view.summary}")
    elif not args.follow:
        raise nothing_to_show(look)


def _wanted(args: argparse.Namespace, rundir: RunDir) -> Wanted:
    rounds: Container[int] | None = None
    if args.round == "last":
        rounds = [rundir.last_round().get("round", 0)]
    elif args.round is not None:
        rounds = _numbers("--round", args.round, "2-4, or last")
    ranks = None if args.rank in {None, "all"} else _numbers("--rank", args.rank, "0-3,8, or all")
    for nodes in args.node or ():
        try:
            name_matcher(nodes)
        except ValueError as error:
            raise UsageError(
                f"--node {nodes!r}: expected names in Slurm's notation, for example --node 'n[10-12]'; {error}"
            ) from None
    streams: list[Stream] | None = ["out"] if args.stdout else ["err"] if args.stderr else None
    if streams is None and args.rank == "all":
        streams = ["out", "err"]
    return Wanted(ranks, args.node, rounds, streams, args.since, args.grep)


def _numbers(option: str, text: str, example: str) -> NumberRanges:
    try:
        return NumberRanges.of(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: expected numbers, for example {option} {example}; {error}") from None


class _Printer:
    """Prints each line with its rank, and a headline for each round."""

    def __init__(self, rundir: RunDir, *, timestamps: bool) -> None:
        self._record = JobRecord(rundir.path)
        self._console = Console(highlight=False, soft_wrap=True)
        self._plain = not self._console.is_terminal
        """Whether to print without rich, which takes ten times as long for a line."""
        self._timestamps = timestamps
        self._round = -1
        self.printed = False

    def print(self, lines: Iterable[LogLine]) -> None:
        for line in lines:
            self.printed = True
            if line.round != self._round:
                self._round = line.round
                self._show((f"--- {self._headline(line.round)}", "bold"))
            moment = f"{clock(line.time)} " if self._timestamps else ""
            label = f"rank {line.rank} err| " if line.stream == "err" else f"rank {line.rank}| "
            if self._plain:
                sys.stdout.write(f"{moment}{label}{line.text}\n")
            else:
                colour = _COLOURS[line.rank % len(_COLOURS)]
                self._show((moment, "dim"), (label, colour), (line.text, "red" if line.stream == "err" else ""))
        sys.stdout.flush()

    def _show(self, *parts: tuple[str, str]) -> None:
        self._console.print(Text.assemble(*parts))

    def _headline(self, number: int) -> str:
        rounds = [round for round in self._record.story().rounds if round.number <= number]
        if not rounds or rounds[-1].number != number:
            return f"round {number}"
        return _headline(rounds[-1], rounds[-2] if len(rounds) > 1 else None)


def _headline(round: Round, before: Round | None) -> str:
    why = "" if before is None else f", after: {before.cause}"
    run = f", run {round.run + 1}" if round.run else ""
    size = f"{count_of(len(round.nodes), 'node')}, {count_of(round.world_size, 'worker')}"
    return f"round {round.number}{run}, {clock(round.formed)}, {size}{why}"
