"""``elastic-hpc why``: why a job went as it did."""

from __future__ import annotations

import argparse

from rich.console import Console

from elastic_hpc.cli.jobs import add_job, single
from elastic_hpc.job.look import Jobs
from elastic_hpc.view.why import page

HELP = "explain how a job went: cause and cost of each restart and requeue, and what to do"
EPILOG = """examples:
  elastic-hpc why 4711
  elastic-hpc why elastic-logs/4711 | less -R

elastic-hpc why reads only the run directory: it also works weeks later, and where there is no Slurm."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)


def run(args: argparse.Namespace) -> int:
    (look,) = Jobs([single("why", args.job)]).look(ends=True)
    Console(highlight=False, soft_wrap=True).print(page(*look))
    return 0
