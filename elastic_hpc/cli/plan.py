"""``elastic-hpc plan``: when a job would start, how large, and which MIN:MAX to request."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from elastic_hpc import slurm
from elastic_hpc.cli import sbatch
from elastic_hpc.errors import UsageError, argument
from elastic_hpc.job.look import Jobs
from elastic_hpc.job.lookup import find
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.job.submission import checked, from_elsewhere
from elastic_hpc.options.durations import seconds
from elastic_hpc.options.sbatch import Option
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.states import Estimate
from elastic_hpc.view.plan import as_json, chosen, plan, table
from elastic_hpc.view.scaling import LINEAR, Scaling, speeds

HELP = "estimate when a job would start and finish for different sizes, and recommend MIN:MAX"
EPILOG = """examples:
  elastic-hpc plan -N 2:8 -p gpu -t 8:00:00 train.py
  elastic-hpc plan --work 30h -N 2:64 train.py       30 hours on 2 nodes
  elastic-hpc plan --scaling 4711 -N 2:8 train.py    as fast and long as 4711
  elastic-hpc plan --scaling speeds.txt --work 30h -N 2:8 train.py

elastic-hpc plan accepts the options of elastic-sbatch, and submits nothing. FILE has lines of NODES STEPS_PER_SECOND.
TIME is a number of seconds, or 30h, 1h30m, 2d."""

_USAGE = "elastic-hpc plan [options] SCRIPT [ARGS...]"
_OWN = (Option("scaling"), Option("work"), Option("json", value=""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = _USAGE
    parser.add_argument(
        "--scaling",
        metavar="linear|FILE|JOB",
        default="linear",
        help="training speed by number of nodes: proportional, read from FILE, or measured in JOB (default: linear)",
    )
    parser.add_argument(
        "--work",
        metavar="TIME",
        type=argument(seconds("--work")),
        help="duration of the training on MIN nodes (default: with --scaling JOB, as many steps as JOB has done)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, described in docs/plan.md")
    parser.add_argument(
        "sbatch", nargs="*", metavar="SCRIPT", help="script and arguments, after options of elastic-sbatch"
    )


def arranged(argv: Sequence[str]) -> list[str]:
    """``argv`` for the parser of ``add_arguments``: the options of elastic-sbatch after ``--``."""
    given, rest = sbatch.read(argv, _OWN, "elastic-hpc plan")
    names = {option.name for option in _OWN} | {"help", "version"}
    ours = [str(g) for g in given if g.name in names]
    return [*ours, "--", *(str(g) for g in given if g.name not in names), *rest]


def run(args: argparse.Namespace) -> int:
    given, rest = sbatch.read(args.sbatch)
    for option in given:
        if option.name in sbatch.SUBMITS:
            raise UsageError(f"{option.flag}: elastic-hpc plan submits nothing; leave it out")
    job = sbatch.job_of(given, rest, _USAGE)
    sizes = _sizes(job)
    scaling, steps = _scaling(args.scaling)
    work = steps if args.work is None else args.work * scaling.speed(sizes[0])
    asked = chosen(sizes)
    ranges = [(least, sizes[-1]) for least in asked]
    if job.grows_elsewhere:
        ranges = [(sizes[0], sizes[0])]
    try:
        script = os.fsencode(checked(job))
        found = slurm.estimates(script, ranges, os.environ)
    except UsageError as error:
        raise UsageError(f"{error}{from_elsewhere(job, str(error))}") from None
    joiners = _joiners(job, script, [size - sizes[0] for size in asked[1:]])
    now = time.time()
    made = plan(found, sizes, scaling, work, now, joiners)
    if args.json:
        print(json.dumps(as_json(made, now), indent=1))
    else:
        Console(highlight=False, soft_wrap=True).print(table(made, sizes, len(asked), now))
    return 0


def _joiners(job: JobSpec, script: bytes, numbers: Sequence[int]) -> Sequence[Estimate]:
    """When Slurm would start these ``numbers`` of joiners, if joiners have options of their own."""
    if not (job.joiners and numbers):
        return ()
    options = [str(given) for given in job.joiners]
    try:
        return slurm.estimates(script, [(number, number) for number in numbers], os.environ, options)
    except UsageError as error:
        raise UsageError(f"the jobs by which the job grows ({' '.join(options)}): {error}") from None


def _sizes(job: JobSpec) -> Sequence[int]:
    """The numbers of nodes that a world of the job may have. If only the nodes know how many workers they start, this
    ignores --world-multiple-of.
    """
    nproc = job.launch.nproc_per_node or ""
    launch = job.launch if nproc.isdecimal() else replace(job.launch, world_multiple_of=None)
    return launch.sizes(int(nproc) if nproc.isdecimal() else 1)


def _scaling(text: str) -> tuple[Scaling, float | None]:
    """The scaling, and how many steps a job has done; None if ``text`` names no job."""
    if text == "linear":
        return LINEAR, None
    if Path(text).is_file():
        try:
            return Scaling.parse(Path(text).read_text(errors="replace")), None
        except (OSError, UsageError) as error:
            raise UsageError(f"--scaling {text}: {error}") from None
    try:
        run_dir = find(text)
    except UsageError as error:
        raise UsageError(f"--scaling {text!r}: expected linear, a file, or a job; {error}") from None
    (look,) = Jobs([RunDir(run_dir)]).look()
    known = speeds(look.story)
    if not known or look.view.step is None:
        raise UsageError(
            f"--scaling {text}: its record has no speed, as its script has not called report_progress(step); expected "
            "another job, linear, or a file with lines of NODES STEPS_PER_SECOND"
        )
    return Scaling(known), float(look.view.step)
