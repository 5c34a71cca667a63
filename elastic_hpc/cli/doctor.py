"""``elastic-hpc doctor``: what the settings of this site mean for elastic jobs, and what its nodes report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from elastic_hpc.cli import screen
from elastic_hpc.doctor.examine import examine
from elastic_hpc.doctor.findings import Finding, Level, as_json, site_file
from elastic_hpc.errors import UsageError, argument
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, SBATCH, Given, scan
from elastic_hpc.options.values import number

HELP = "check this site's Slurm for elastic jobs, and recommend settings"
EPILOG = """\
examples:
  elastic-hpc doctor
  elastic-hpc doctor --run --partition gpu -- --gpus-per-node=4 --account=mine
  elastic-hpc doctor --run --write-site site.toml

Options of sbatch after -- apply to the job of --run."""
EXCEPTIONS = "Code 1 also means a bad finding."
_OURS = frozenset(
    {
        *("nodes", "time", "job-name", "output", "error", "array"),
        *("signal", "no-requeue", "requeue", "chdir", "hold", "wrap"),
    }
)
_COLORS = {Level.BAD: "bold red", Level.WARN: "yellow", Level.UNKNOWN: "magenta", Level.NOTE: "cyan", Level.OK: "green"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", action="store_true", dest="runs", help="check the nodes too, with a one-minute job")
    parser.add_argument(
        "-N", "--nodes", type=argument(_nodes), metavar="N", help="number of nodes of that job (default: 2)"
    )
    parser.add_argument("-p", "--partition", metavar="NAME", help="partition to check")
    parser.add_argument("--log-dir", metavar="DIR", help="parent folder of run directories (default: ./elastic-logs)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--write-site", metavar="FILE", help="write the recommended settings to FILE, a new configuration file"
    )
    parser.add_argument("sbatch", nargs="*", metavar="-- SBATCH-OPTION", help="options of sbatch for the job of --run")


def _nodes(text: str) -> int:
    if not (nodes := number(text)):
        raise UsageError(f"--nodes {text!r}: expected a number of nodes, 1 or more, for example --nodes 2")
    return nodes


def run(args: argparse.Namespace) -> int:
    options = _options(args)
    if args.write_site and os.path.lexists(args.write_site):
        raise UsageError(f"--write-site {args.write_site}: is there already; expected a new file")
    progress = _Progress()
    try:
        nodes = (args.nodes or 2) if args.runs else 0
        findings, slurm_answered = examine(args.partition, args.log_dir, nodes, options, progress.tell)
    finally:
        progress.end()
    if args.json:
        print(as_json(findings))
    else:
        _show(findings)
    if args.write_site and slurm_answered:
        _write(args.write_site, site_file(findings, options, args.log_dir and os.path.abspath(args.log_dir)))
    return 1 if findings[0].level is Level.BAD else 0


def _options(args: argparse.Namespace) -> list[Given]:
    """The options for sbatch, with the partition."""
    options, rest = scan(args.sbatch, ())
    if rest:
        raise UsageError(f"{rest[0]!r}: expected options of sbatch after --, for example -- --account=mine")
    if (options or args.nodes) and not args.runs:
        raise UsageError("--nodes and options of sbatch: they are for the job of --run")
    for given in options:
        if given.name in COMMAND_LINE_ONLY or given.name in _OURS:
            raise UsageError(f"{given.flag}: the job of --run has its own; leave it out, --nodes belongs before --")
    if args.partition:
        options = [Given(SBATCH["partition"], args.partition), *options]
    return options


class _Progress:
    """One line on stderr, updated on a terminal; elsewhere a line whenever the job waits for something else."""

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._last = ""

    def tell(self, text: str) -> None:
        without_time = text.rpartition(",")[0] or text
        if self._on_terminal:
            print(f"\r\033[K{text.strip()}", end="", file=sys.stderr, flush=True)
        elif without_time != self._last:
            print(f"elastic-hpc: {text.strip()}", file=sys.stderr, flush=True)
        self._last = without_time

    def end(self) -> None:
        if self._on_terminal and self._last:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _show(findings: Sequence[Finding]) -> None:
    widths = (max(len(f.level.value) for f in findings), max(len(f.about) for f in findings), None)
    table = Table.grid(padding=(0, 2))
    for width in widths:
        table.add_column(width=width, overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        text.append((": " if finding.level is Level.OK else "\n") + finding.means)
        if finding.set:
            text.append(f"\n{finding.set}", style="bold")
        table.add_row(Text(finding.level.value, style=_COLORS[finding.level]), Text(finding.about), text)
    screen.show(screen.console(), table)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "x") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"--write-site {path}: {error.strerror}; expected a new file in a folder of yours") from None
    print(f"written: {path}; to use it: export ELASTIC_HPC_CONFIG={os.path.abspath(path)}", file=sys.stderr)
