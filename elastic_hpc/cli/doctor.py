"""``elastic-hpc doctor``: what the settings of this site mean for elastic jobs, and what its nodes say."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from elastic_hpc import slurm
from elastic_hpc.doctor import job as probe_job
from elastic_hpc.doctor.nodes import run_findings
from elastic_hpc.doctor.site_file import site_file
from elastic_hpc.doctor.slurm_settings import Finding, Level, as_json, log_dir_finding, slurm_findings, worst_first
from elastic_hpc.errors import ElasticError, SlurmError, UsageError, argument
from elastic_hpc.job.config import Settings, load
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, SBATCH, Given, last, scan
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import number

HELP = "tell what this site means for elastic jobs, and what to set"
_EPILOG = """\
examples:
  elastic-hpc doctor
  elastic-hpc doctor --run --partition gpu -- --gpus-per-node=4 --account=mine
  elastic-hpc doctor --run --write-site site.toml

What follows -- are options of sbatch for the job of --run.
Exit codes: 0, 1 if something is bad, 2 for bad input.
"""
_OURS = frozenset(
    {
        *("nodes", "time", "job-name", "output", "error", "array"),
        *("signal", "no-requeue", "requeue", "chdir", "hold", "wrap"),
    }
)
_COLORS = {Level.BAD: "bold red", Level.WARN: "yellow", Level.UNKNOWN: "magenta", Level.NOTE: "cyan", Level.OK: "green"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--run", action="store_true", dest="runs", help="ask the nodes too, by a job of one minute")
    parser.add_argument(
        "--nodes", "-N", type=argument(_nodes), metavar="N", help="how many nodes --run asks (default: 2)"
    )
    parser.add_argument("--partition", "-p", metavar="NAME", help="the partition that is asked about")
    parser.add_argument("--log-dir", metavar="DIR", help="parent of run directories (default: ./elastic-logs)")
    parser.add_argument("--json", action="store_true", help="findings for programs")
    parser.add_argument(
        "--write-site", metavar="FILE", help="write a configuration file of what follows; it must be new"
    )
    parser.add_argument("sbatch", nargs="*", metavar="-- SBATCH-OPTION", help="for the job of --run")


def _nodes(text: str) -> int:
    if not (nodes := number(text)):
        raise UsageError(f"--nodes {text!r}: expected a number of nodes, 1 or more, for example --nodes 2")
    return nodes


def run(args: argparse.Namespace) -> int:
    options = _options(args)
    if args.write_site and os.path.lexists(args.write_site):
        raise UsageError(f"--write-site {args.write_site}: is there already; expected a new file")
    settings, findings = _configuration()
    partition = args.partition or last(settings.sbatch, "partition")
    grace = settings.options["grace"].value if "grace" in settings.options else LaunchSpec.grace
    facts = slurm.facts(partition)
    if partition and "unknown to Slurm" in facts.unknown.get("partition", ""):
        raise UsageError(f"--partition {partition}: unknown to Slurm; see sinfo")
    findings += slurm_findings(facts, grace)
    configured = settings.options["log-dir"].value if "log-dir" in settings.options else "elastic-logs"
    log_dir = os.path.abspath(args.log_dir or configured)
    seen = _of_nodes(args, log_dir, options) if args.runs and facts.answered else [_log_dir(log_dir)]
    judged = {finding.about for finding in seen}  # on the nodes, which know better than the settings
    findings = worst_first([*seen, *(finding for finding in findings if finding.about not in judged)])
    if args.json:
        print(as_json(findings))
    else:
        _show(findings)
    if args.write_site and facts.answered:
        _write(args.write_site, findings, options, log_dir if args.log_dir else None)
    return 1 if findings[0].level is Level.BAD else 0


def _options(args: argparse.Namespace) -> list[Given]:
    """What sbatch is told, the partition among it."""
    options, rest = scan(args.sbatch, ())
    if rest:
        raise UsageError(f"{rest[0]!r}: expected options of sbatch after --, for example -- --account=mine")
    if (options or args.nodes) and not args.runs:
        raise UsageError("--nodes and options of sbatch: they are for the job of --run")
    for given in options:
        if given.name in COMMAND_LINE_ONLY or given.name in _OURS:
            raise UsageError(
                f"{given.option.flag}: the job of --run has its own; leave it out, --nodes belongs before --"
            )
    if args.partition:
        options = [Given(SBATCH["partition"], args.partition), *options]
    return options


def _configuration() -> tuple[Settings, list[Finding]]:
    about = "configuration files"
    try:
        settings = load(os.environ, Path.cwd())
    except ElasticError as error:
        means = "elastic-sbatch refuses every job"
        return Settings(), [Finding(Level.BAD, about, str(error), means, "you: mend the file that is named")]
    sources = [setting.source for setting in settings.options.values()] + [given.source for given in settings.sbatch]
    found = ", ".join(dict.fromkeys(sources)) or "none, or nothing in them"
    return settings, [Finding(Level.OK, about, found, "they can be read")]


def _log_dir(log_dir: str) -> Finding:
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError as error:
        return Finding(Level.UNKNOWN, "log-dir", f"/proc/self/mountinfo: {error.strerror}", "not judged", "you: --run")
    return log_dir_finding(mounts, os.path.realpath(log_dir))


def _of_nodes(args: argparse.Namespace, log_dir: str, options: Sequence[Given]) -> list[Finding]:
    progress = _Progress()
    try:
        found = probe_job.run(args.nodes or 2, log_dir, options, progress.tell)
    except SlurmError as error:
        return [Finding(Level.UNKNOWN, "nodes", str(error), "the nodes could not be asked", "you: try again")]
    except ElasticError as error:
        means = "the nodes could not be asked; elastic-sbatch may be refused too"
        return [Finding(Level.BAD, "nodes", str(error), means)]
    finally:
        progress.end()
    return run_findings(found, log_dir)


class _Progress:
    """One line on stderr, renewed on a terminal; elsewhere a line whenever something else is waited for."""

    def __init__(self) -> None:
        self._live, self._last, self._begin = sys.stderr.isatty(), "", time.monotonic()

    def tell(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text.strip()}", end="", file=sys.stderr, flush=True)
        elif (what := text.rpartition(",")[0] or text) != self._last:
            self._last = what
            print(f"elastic-hpc: {text.strip()}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _show(findings: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    for width in (max(len(one.level.value) for one in findings), max(len(one.about) for one in findings), None):
        table.add_column(width=width, overflow="fold")
    for one in findings:
        text = Text(one.found)
        text.append((": " if one.level is Level.OK else "\n") + one.means)
        if one.set:
            text.append(f"\n{one.set}", style="bold")
        table.add_row(Text(one.level.value, style=_COLORS[one.level]), Text(one.about), text)
    Console().print(table)


def _write(path: str, findings: Sequence[Finding], options: Sequence[Given], log_dir: str | None) -> None:
    try:
        with open(path, "x") as file:
            file.write(site_file(findings, options, log_dir))
    except OSError as error:
        raise UsageError(f"--write-site {path}: {error.strerror}; expected a new file in a folder of yours") from None
    print(f"written: {path}; to use it: export ELASTIC_HPC_CONFIG={os.path.abspath(path)}", file=sys.stderr)
