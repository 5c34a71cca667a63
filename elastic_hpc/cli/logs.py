"""``elastic-hpc logs``: what the workers wrote."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.text import Text

from elastic_hpc.cli.jobs import add_job
from elastic_hpc.cli.status import Jobs
from elastic_hpc.errors import UsageError
from elastic_hpc.rundir import EventReader, RunDir
from elastic_hpc.view.logs import Line, Logs, Stream, Wanted
from elastic_hpc.view.status import clock
from elastic_hpc.view.story import Round, tell

HELP = "show what the workers wrote, in order of time over ranks and rounds"
_EPILOG = """examples:
  elastic-hpc logs 4711                   rank 0, and what any rank wrote to stderr
  elastic-hpc logs 4711 -f                follow it, through restarts and requeues, until the job ends
  elastic-hpc logs 4711 --rank 0-3,8      all that these ranks wrote
  elastic-hpc logs 4711 --round 2 --node n3 --stderr
  elastic-hpc logs 4711 -t -n 100 --rank all

Lines of different ranks are put in order by when their agent saw the file grow: to a second at first, to half a minute
in rounds of hours. With -f they come as they are written."""

_LOOK, _ASK = 0.3, 5.0
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    add_job(parser, started=False)
    parser.epilog = _EPILOG
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more is written, until the job ends")
    parser.add_argument("--rank", metavar="R", help="of these ranks only: 3, 0-7, 0,8, or all")
    parser.add_argument(
        "--node",
        metavar="N",
        action="append",
        help="of this node only; may be repeated, or be a pattern: 'n[1-4]', 'gpu*'",
    )
    parser.add_argument("--round", metavar="K", help="of these rounds only: 2, 2-4, or last")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stdout", action="store_true", help="only what was written to stdout")
    which.add_argument("--stderr", action="store_true", help="only what was written to stderr")
    parser.add_argument("-n", "--lines", metavar="N", type=int, help="only the last N lines of what is there")
    parser.add_argument("-t", "--timestamps", action="store_true", help="say when each line was written")


def run(args: argparse.Namespace) -> int:
    """The command; the answer is its exit code."""
    rundir: RunDir = args.job
    if args.lines is not None and args.lines < 0:
        raise UsageError(f"--lines {args.lines}: expected a number of lines, for example --lines 100")
    if not args.follow and not rundir.path.is_dir():
        raise UsageError(
            f"job {rundir.path.name} has not started yet; wait for it: elastic-hpc logs -f {rundir.path.name}"
        )
    wanted, printer = _wanted(args, rundir), _Printer(rundir, timestamps=args.timestamps)
    logs = Logs(rundir.path / "logs", wanted)
    lines: Iterable[Line] = logs.there(follow=args.follow)
    printer.print(lines if args.lines is None else deque(lines, maxlen=args.lines))
    if args.follow:
        _follow(rundir, logs, printer)
    return 0


def _follow(rundir: RunDir, logs: Logs, printer: _Printer) -> None:
    jobs, asked, told = Jobs([rundir]), float("-inf"), ""
    while True:
        over = False
        if time.monotonic() - asked > _ASK:
            asked = time.monotonic()
            ((view, _),) = jobs.look()
            over = (view.over or view.state == "UNKNOWN") and not jobs.problem
            now = f"{view.state}: {view.note}" if view.note else view.state
            if view.state != "RUNNING" and now != told:
                print(f"elastic-hpc: job {view.id} is {now}", file=sys.stderr)
            told = now
        printer.print(logs.added(time.time()))
        if over:
            printer.print(logs.rest(time.time()))
            return
        time.sleep(_LOOK)


def _wanted(args: argparse.Namespace, rundir: RunDir) -> Wanted:
    rounds: Collection[int] | None = None
    if args.round == "last":
        rounds = [rundir.last_round().get("round", 0)]
    elif args.round:
        rounds = _numbers("--round", args.round)
    ranks = None if args.rank in {None, "all"} else _numbers("--rank", args.rank)
    streams: list[Stream] | None = ["out"] if args.stdout else ["err"] if args.stderr else None
    if streams is None and args.rank == "all":
        streams = ["out", "err"]
    return Wanted(ranks, args.node, rounds, streams)


def _numbers(option: str, text: str) -> set[int]:
    """``0-3,8`` as numbers."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            found.update(range(int(first), int(last if dash else first) + 1))
        except ValueError:
            raise UsageError(f"{option} {text!r}: expected numbers, for example {option} 0-3,8") from None
    return found


class _Printer:
    """Each line with its rank, and a headline for each round."""

    def __init__(self, rundir: RunDir, *, timestamps: bool) -> None:
        self._reader = EventReader(rundir)
        self._console = Console(highlight=False, soft_wrap=True)
        self._timestamps = timestamps
        self._round = -1

    def print(self, lines: Iterable[Line]) -> None:
        for line in lines:
            if line.round != self._round:
                self._round = line.round
                self._console.print(Text(f"--- {self._headline(line.round)}", "bold"))
            shown = Text()
            if self._timestamps:
                shown.append(f"{clock(line.time)} ", "dim")
            label = f"rank {line.rank}" + (" err" if line.stream == "err" else "")
            shown.append(f"{label}| ", _COLOURS[line.rank % len(_COLOURS)])
            shown.append(line.text, "red" if line.stream == "err" else "")
            self._console.print(shown)

    def _headline(self, number: int) -> str:
        self._reader.read()
        story = tell(self._reader.events)
        rounds = [one for one in story.rounds if one.number <= number]
        if not rounds or rounds[-1].number != number:
            return f"round {number}"
        return _headline(rounds[-1], rounds[-2] if len(rounds) > 1 else None)


def _headline(one: Round, before: Round | None) -> str:
    why = "" if before is None else f", after: {before.cause}"
    again = f", run {one.run + 1}" if one.run else ""
    return f"round {one.number}{again}, {clock(one.formed)}, {len(one.nodes)} nodes, {one.world_size} workers{why}"
