"""``elastic-hpc rehearse``: exposes the user's own script to faults on this machine, and checks how it resumes."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from elastic_hpc.errors import ElasticError, UsageError, argument, of_option
from elastic_hpc.job.launch import LaunchConfig
from elastic_hpc.job.script_file import check_script
from elastic_hpc.options.durations import seconds
from elastic_hpc.options.values import positive
from elastic_hpc.rehearse.plan import LEAST, ORDER, Judgement, exit_code, plan
from elastic_hpc.rehearse.run import Rehearsal, RehearsalOptions

HELP = "test on this machine whether your script resumes correctly after lost workers and nodes"

EPILOG = """acts:
  worker   kill a worker
  head     kill the agent that leads; another agent takes over
  node     kill an agent that does not lead
  drain    the script saves and stops; start it again
  shrink   drain, then start on one node fewer
  grow     drain, then start on more nodes

examples:
  elastic-hpc rehearse train.py --lr 1e-3
  elastic-hpc rehearse --acts worker,drain train.py --save {folder}/checkpoints
  elastic-hpc rehearse --nodes 2 --nproc-per-node 2 --json train.py

The script runs in the current folder and writes its checkpoints where it always does: in the run directory that
ELASTIC_HPC_RUN_DIR names, or where its arguments say. In the arguments, {folder} stands for the rehearsal's own folder.
"""
EXCEPTIONS = "Code 1 also means that the script did not resume correctly, code 3 that no judgement is possible."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes",
        type=argument(of_option("--nodes", positive)),
        default=3,
        metavar="N",
        help="number of agents (default: 3)",
    )
    parser.add_argument("--nproc-per-node", default="1", metavar="K", help="workers of each agent (default: 1)")
    parser.add_argument("--acts", metavar="LIST", help=f"acts to perform, in this order (default: {','.join(ORDER)})")
    parser.add_argument(
        "--steps",
        type=argument(of_option("--steps", positive)),
        default=50,
        metavar="N",
        help="steps before each act and after the last; must exceed the steps between two checkpoints (default: 50)",
    )
    parser.add_argument(
        "--timeout",
        type=argument(seconds("--timeout")),
        default=120,
        metavar="TIME",
        help="maximum time to wait for the next step; in seconds, or as 5m (default: 120 s)",
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="new folder for the rehearsal's files (default: a temporary folder, kept unless all acts passed)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and progress to stderr")
    parser.add_argument("script", metavar="SCRIPT", help="the training script")
    parser.add_argument("script_args", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(args: argparse.Namespace) -> int:
    """The exit code. Raises UsageError, and ElasticError if the script fails without a fault."""
    acts = _acts(args.acts, args.nodes)
    planned = plan(acts, args.nodes)
    check_script(args.script)
    LaunchConfig(nproc_per_node=args.nproc_per_node)  # refuses a wrong value before this makes the folder
    folder = _folder(args.keep)
    options = RehearsalOptions(
        args.script, args.script_args, args.nodes, args.nproc_per_node, args.steps, args.timeout, folder
    )
    screen = sys.stderr if args.json else sys.stdout
    rehearsal = Rehearsal(options, planned, lambda text: print(text, file=screen, flush=True))
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    try:
        rehearsal.run()
    except KeyboardInterrupt:
        print(f"elastic-hpc: interrupted; what the script has printed is in {folder}/output", file=sys.stderr)
        return 130
    if not rehearsal.acts and rehearsal.crashes and not rehearsal.finished:
        trace = rehearsal.crashes[-1].traceback
        raise ElasticError(f"the script failed before the first act: {rehearsal.end} ({folder}/output)\n{trace}")
    return _report(rehearsal, folder, keep=args.keep is not None, as_json=args.json)


def _acts(text: str | None, nodes: int) -> Sequence[str]:
    if text is None:
        return [act for act in ORDER if LEAST[act] <= nodes]
    acts = [act.strip() for act in text.split(",")]
    if unknown := [act for act in acts if act not in LEAST]:
        raise UsageError(f"--acts {text}: {unknown[0]!r} is unknown; expected some of {','.join(ORDER)}")
    return acts


def _folder(keep: str | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="elastic-hpc-rehearsal."))
    try:
        Path(keep).mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise UsageError(f"--keep {keep}: {error.strerror}; expected the name of a new folder") from error
    return Path(keep).absolute()


def _report(rehearsal: Rehearsal, folder: Path, *, keep: bool, as_json: bool) -> int:
    judgements = rehearsal.judgements()
    code = exit_code(judgements)
    kept = keep or code != 0
    if as_json:
        report = {"findings": [asdict(judgement) for judgement in judgements], "folder": str(folder) if kept else None}
        print(json.dumps({**report, "exit_code": code}, indent=1))
    else:
        print()
        for _, alike in groupby(judgements, key=lambda each: (each.verdict, each.said, each.traceback)):
            first, *others = alike
            _show(first)
            if others:
                print(f"{', '.join(judgement.act for judgement in others)}: the same")
        if kept:
            print(f"\nThe output of the script is in {folder}/output, beside the steps and the run directory.")
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _show(judgement: Judgement) -> None:
    first, *others = judgement.said
    print(f"{judgement.act:8}{judgement.verdict:13}{first}")
    for text in (*others, *judgement.traceback.splitlines()):
        print(f"{'':21}{text}")
