"""``elastic-hpc notice``: a node is about to fail."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from elastic_hpc.cli import entry
from elastic_hpc.cli.jobs import add_job, single
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.job.handle import Job
from elastic_hpc.job.notices import as_owner, jobs_on

HELP = "announce to a job, or to all jobs on this node, that a node is about to fail; the jobs leave the node"
EPILOG = """examples:
  elastic-hpc notice 4711 --node n2 "ECC errors rising"
  elastic-hpc notice 4711 --well n2                     the job may use n2 again
  elastic-hpc notice --node "$(hostname -s)" "ECC errors rising"
      on n2 itself, for all your jobs there

A notice from root, without JOB, goes to the jobs of all users on the node, for example from a prolog, an epilog or a
health check. A job leaves the node at the next step boundary, if MIN nodes remain, and avoids the node for a day."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser, nargs="?")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--node", nargs=2, metavar=("NODE", "REASON"), help="Slurm's name of the node, and the reason")
    what.add_argument("--well", metavar="NODE", help="withdraw the notice of this node")


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 if one of several jobs could not be notified."""
    node, reason = args.node or (args.well, None)
    if reason is not None and not reason.strip():
        raise UsageError(
            f"--node {node} {reason!r}: expected why it is about to fail; to withdraw a notice: --well {node}"
        )
    if args.job:
        run_dir = single("notice", args.job).path
        _tell(run_dir, run_dir.stat().st_uid if run_dir.exists() else os.geteuid(), node, reason)
        return 0
    jobs = jobs_on(node)
    if not jobs and os.geteuid():
        raise ElasticError(
            f"no job of yours has an agent on this machine as a node {node}; name the job: elastic-hpc notice JOB ..."
        )
    code = 0
    for run_dir, owner in jobs.items():
        try:
            _tell(run_dir, owner, node, reason)
        except ElasticError as error:
            entry.tell("elastic-hpc", f"{run_dir}: {error}")
            code = 1
    return code


def _tell(run_dir: Path, owner: int, node: str, reason: str | None) -> None:
    if owner != os.geteuid() == 0:
        what = ["--well", node] if reason is None else ["--node", node, reason]
        print(as_owner(owner, ["notice", str(run_dir), *what]), end="")
        return
    Job(run_dir).notice(node, reason)
    print(f"job {run_dir.name} " + (f"may use {node} again" if reason is None else f"leaves {node}"))
