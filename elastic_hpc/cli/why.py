"""``elastic-hpc why``: what happened to a job, and why."""

from __future__ import annotations

import argparse
import json
import time

from rich.console import Console

from elastic_hpc.cli.jobs import add_job, single
from elastic_hpc.job.look import Jobs
from elastic_hpc.view.why import page
from elastic_hpc.view.why_json import as_json

HELP = "explain how a job went: cause and cost of each restart and requeue, and what to do"
EPILOG = """examples:
  elastic-hpc why 4711
  elastic-hpc why elastic-logs/4711 | less -R
  elastic-hpc why 4711 --json | jq -r '.rounds[] | [.number, .cause] | @tsv'

elastic-hpc why reads the run directory, and asks Slurm what it knows of the job. It also works if Slurm no longer knows
the job, and where there is no Slurm."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, described in docs/status.md")


def run(args: argparse.Namespace) -> int:
    jobs = Jobs([single("why", args.job)])
    (look,) = jobs.look(ends=True)
    if args.json:
        print(json.dumps(as_json(*look, time.time(), jobs.problem), indent=1))
        return 0
    Console(highlight=False, soft_wrap=True).print(page(*look))
    return 0
