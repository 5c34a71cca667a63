"""``elastic-srun``: the agents of an elastic job in the current allocation, or on this machine alone."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_hpc import __version__, slurm
from elastic_hpc.agent.conclude import await_verdict
from elastic_hpc.cli import entry, sbatch
from elastic_hpc.cli.agents import Agents
from elastic_hpc.cli.manual import EXIT_CODES, manual
from elastic_hpc.environment import LOCAL_NODE, LOCAL_NODES, for_a_new_job
from elastic_hpc.errors import UsageError
from elastic_hpc.job.commands import agent_command, srun_options
from elastic_hpc.job.programs import check_module, find_program, find_script
from elastic_hpc.options.of_joiners import JOINERS, is_for_joiners
from elastic_hpc.options.sbatch import SBATCH, check, scan
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import (
    ABOUT_SWITCHES,
    ELASTIC,
    IN_ALLOCATION,
    SCRIPT_SWITCHES,
    ElasticOption,
    refuse_switch_apart,
)
from elastic_hpc.options.torchrun import OPTIONS as TORCHRUN
from elastic_hpc.options.torchrun import translate, unneeded
from elastic_hpc.options.values import NodeRange, number
from elastic_hpc.record.events import event_files
from elastic_hpc.record.registry import remember
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import run_number

_USAGE = "elastic-srun [options] SCRIPT [ARGS...]"
_DESCRIPTION = """\
Run SCRIPT on the nodes of the current Slurm allocation. The run survives the loss of nodes.

examples:
  salloc --nodes 4 --no-kill elastic-srun train.py --lr 1e-3
      in an allocation, on all its nodes; MIN is 1
  elastic-srun --nodes 2:4 train.py
      on 2 to 4 of the allocation's nodes
  elastic-srun --standalone --nproc-per-node 2 train.py
      on this machine, without Slurm, as torchrun --standalone
  elastic-srun --local 4 train.py
      rehearse with 4 agents on this machine, without Slurm

Everything after SCRIPT belongs to the script. Without --no-kill Slurm ends the allocation when a node is lost.
elastic-srun accepts the options of torchrun that are useful here, with dashes or underscores: --nnodes means --nodes,
--master_addr and --master_port mean --rdzv-endpoint. It ignores those whose effect every elastic job has, refuses the
rest, and names the replacement.

TIME is a number of seconds, or 90s, 5m, 1h30m, 2d, or Slurm's [D-]HH:MM:SS or MM:SS.
"""
_NOTES = f"""
Ctrl-C once lets the workers save and stop (--grace), twice stops them at once, a third time kills the agents.

{EXIT_CODES}
"""
_WHERE = (
    ElasticOption("local", "N", str, help="run N agents as processes on this machine, without Slurm"),
    ElasticOption("standalone", "", bool, help="run one agent on this machine, without Slurm"),
    ElasticOption("nodelist", "NODES", str, letter="w",
                  help="nodes of the allocation to run on, in Slurm's notation, for example n[3-4] "
                       "(default: the first nodes)"),
    ELASTIC["log-dir"],
    ElasticOption("run-dir", "DIR", str,
                  help="run directory; no other run may have used it (default: a new folder in --log-dir)"),
)  # fmt: skip
_SUBMITTED = {
    *("array", "batch", "error", "export", "export-file", "ignore-pbs", "input", "open-mode", "output", "propagate"),
    *("requeue", "no-requeue", "wrap"),
    *(option.name for option in sbatch.OWN),
}
"""Options of a submission, which salloc does not have."""
_TASKS = {"ntasks", "ntasks-per-node", "tasks-per-node", "ntasks-per-gpu", "ntasks-per-tres"}
_ONE_OF = ("local", "standalone", "nodelist")
_WITHOUT_EFFECT = {"local": {"wait-for-nodes"}, "standalone": {"wait-for-nodes", "grow-every", "free-growth"}}
"""Options for nodes that return, where no node does. With --local, a node that a notice named may return."""
_AGAIN = ElasticOption("again", "", bool, "")  # for a rehearsal: see _given_run_dir
_OPTIONS = {option.name: option for option in (*_WHERE, _AGAIN, *IN_ALLOCATION, *SCRIPT_SWITCHES, *ABOUT_SWITCHES)}
_OWN = tuple(option.scanned() for option in _OPTIONS.values() if option is not _AGAIN)
MANUAL = manual(
    _USAGE,
    _DESCRIPTION,
    {
        "where it runs": _WHERE,
        "launch options": IN_ALLOCATION,
        "what to do": (*SCRIPT_SWITCHES, *ABOUT_SWITCHES),
    },
    _NOTES,
)


def _read(argv: Sequence[str]) -> argparse.Namespace | str:
    """The command line, parsed; or the text to show for --help or --version."""
    foreign = (*SBATCH.values(), *JOINERS.values(), *TORCHRUN, *sbatch.OWN, _AGAIN.scanned())
    given, rest = scan(argv, _OWN, foreign, "elastic-srun")
    names = [option.name for option in given]
    if "help" in names:
        return MANUAL.format_help()
    if "version" in names:
        return f"elastic-srun {__version__}\n"
    if not rest or not rest[0]:
        raise UsageError(f"expected SCRIPT; usage: {_USAGE}")
    refuse_switch_apart(given, rest)
    if len(where := list(dict.fromkeys(f"--{name}" for name in names if name in _ONE_OF))) > 1:
        raise UsageError(f"{' with '.join(where)}: only one of them can say where to run; leave out the others")
    if "module" in names and "no-python" in names:
        raise UsageError("--no-python with --module: a module needs Python; leave out one of the two options")
    ours, others = translate([option for option in given if option.name != "standalone"])
    for option in others:
        unneeded(option)
    for option in ours:
        if option.name in _OPTIONS:
            if any(option.name in _WITHOUT_EFFECT[name] for name in names if name in _WITHOUT_EFFECT):
                raise UsageError(f"{option} with {where[0]}: no node returns to such a run; leave it out")
            continue
        if option.name in _SUBMITTED or is_for_joiners(option.name):
            raise UsageError(
                f"{option}: is for jobs that elastic-sbatch submits; elastic-srun runs in the current allocation; "
                "leave it out"
            )
        if option.name in _TASKS and not (option.value == "1" and option.name.endswith("tasks-per-node")):
            raise UsageError(
                f"{option}: elastic-srun starts one agent on each node; leave it out, and use --nodes MIN:MAX for the "
                "nodes, --nproc-per-node N for the workers of a node"
            )
        if check(option):
            raise UsageError(
                f"{option.flag}: is for the allocation that elastic-srun runs in, for example: salloc "
                f"{option.flag}{'=' + option.value if option.value else ''} {_typed(names, rest[0])}"
            )
    values: dict[str, Any] = {option.dest: None for option in _OPTIONS.values()}
    for option in ours:
        if own := _OPTIONS.get(option.name):
            value = "on" if option.value is None else option.value
            values[own.dest] = own.parse(value) if own.metavar else True
    values["standalone"] = "standalone" in names
    return argparse.Namespace(**values, how=names, script=rest[0], script_args=rest[1:])


def _typed(switches: Collection[str], script: str, where: str = "") -> str:
    """The command line for an example."""
    how = [option.flags[0] for option in SCRIPT_SWITCHES if option.name in switches]
    return " ".join(filter(None, ["elastic-srun", where, *how, script]))


def _nodes_here(args: argparse.Namespace) -> int:
    """The number of agents that this can start."""
    if args.standalone:
        return 1
    if args.local is not None:
        if not (agents := number(args.local)):
            raise UsageError(f"--local {args.local!r}: expected a number of agents above 0, for example --local 4")
        return agents
    here, alone = (_typed(args.how, args.script, where) for where in ("", "--standalone"))
    if "SLURM_HET_SIZE" in os.environ:
        raise UsageError(
            f"a heterogeneous allocation of {os.environ['SLURM_HET_SIZE']} components: expected nodes of one kind, "
            f"for example: salloc --nodes 4 --no-kill {here}"
        )
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError(
            f"not inside a Slurm allocation; get one, for example: salloc --nodes 4 --no-kill {here}, or run on this "
            f"machine alone: {alone}"
        )
    if "SLURM_GPUS_PER_TASK" in os.environ or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", ""):
        raise UsageError(
            "an allocation with --gpus-per-task: an agent, the one task of its node, would get one task's GPUs; "
            f"expected --gpus-per-node, for example: salloc --gpus-per-node 4 {here}"
        )
    nodes = slurm.expand(slurm.show_job(os.environ["SLURM_JOB_ID"]).nodes)
    if args.nodelist is None:
        return len(nodes)
    wanted = slurm.expand(args.nodelist)
    if not wanted or not set(wanted) <= set(nodes):
        raise UsageError(f"--nodelist {args.nodelist}: expected nodes of the allocation, which has {', '.join(nodes)}")
    return len(wanted)


def _commands(
    launch: LaunchSpec, count: int, rundir: RunDir, nodelist: str | None, *, local: bool
) -> list[tuple[list[str], dict[str, str]]]:
    """The processes to start, each with its environment."""
    agent = agent_command(launch, head="", run_dir=str(rundir.path), python=(sys.executable,), can_requeue=False)
    if local:
        return [(agent, {**os.environ, LOCAL_NODE: str(node), LOCAL_NODES: str(count)}) for node in range(count)]
    # Overlap: this may run in a step that has all the node's resources. No --cpus-per-task: then an agent has all that
    # the job has on its node, for whatever number of tasks the allocation was made.
    step = ["srun", f"--jobid={os.environ['SLURM_JOB_ID']}", "--overlap", "--mem=0", "--input=none", "--unbuffered"]
    where = [] if nodelist is None else [f"--nodelist={nodelist}"]
    return [([*step, *where, *srun_options(str(count)), *agent], slurm.step_environment(os.environ))]


def _given_run_dir(path: str, *, again: bool) -> RunDir:
    """The run directory ``path``. ``again``: a run that has ended there continues, as a requeued job does."""
    rundir = RunDir(Path(path).absolute()).create()
    if event_files(rundir.path):
        if not again or rundir.is_held():
            raise UsageError(f"--run-dir {path!r}: another run has been there; choose a new one, or remove it")
        rundir.forget_verdict()
        (rundir.path / "endpoint.json").unlink(missing_ok=True)
    return rundir


def _outcome(rundir: RunDir, run: Agents, *, local: bool) -> int:
    if local:
        verdict = rundir.read("verdict.json")
    else:
        verdict = await_verdict(rundir, run_number(os.environ), run.handle_signals)
    if verdict is None:
        entry.tell("elastic-srun", "the agents left no verdict; see their messages above")
        return 1
    entry.tell("elastic-srun", f"elastic-hpc why {shlex.quote(str(rundir.path))} explains the run")
    return 0 if verdict["outcome"] == "finished" else 1  # the leader has logged the verdict


def _request(args: argparse.Namespace, here: int) -> tuple[LaunchSpec, int]:
    """What to run, and on how many of ``here`` nodes."""
    launch = LaunchSpec.from_namespace(args)
    if args.nodes is None:
        launch = replace(launch, nodes=NodeRange(1, here))
    if launch.nodes.min > here:
        raise UsageError(
            f"--nodes {launch.nodes}: expected at most the {here} nodes there are, for example --nodes {here}"
        )
    launch.check_sizes()
    if launch.no_python:
        find_program(launch.script, os.getcwd(), Path.cwd())
    elif launch.module:
        check_module(launch.script)
    else:
        find_script(launch.script, os.getcwd(), Path.cwd())
    return launch, min(here, launch.most_nodes)


def _main(argv: list[str] | None) -> int:
    args = _read(sys.argv[1:] if argv is None else argv)
    if isinstance(args, str):
        print(args, end="")
        return 0
    for name in os.environ.keys() - for_a_new_job(os.environ).keys():  # a worker may have started this process
        del os.environ[name]
    launch, count = _request(args, _nodes_here(args))
    local = args.standalone or args.local is not None
    job = "local" if local else os.environ["SLURM_JOB_ID"]
    given, log_dir = args.run_dir, args.log_dir or "elastic-logs"
    rundir = _given_run_dir(given, again=args.again) if given else RunDir.new(log_dir, job)
    if local and launch.rdzv_id is None:
        again = (rundir.read("spec.json") or {}).get("--rdzv-id")
        launch = replace(launch, rdzv_id=again or secrets.token_hex(8))
    if not args.again:  # a rehearsal is no job of the user
        remember(rundir.path)
    with rundir.hold() if local else contextlib.nullcontext():
        run = Agents(rundir, _commands(launch, count, rundir, args.nodelist, local=local))
        run.wait()
        code = _outcome(rundir, run, local=local)
    return 130 if run.interrupted else code


def main(argv: list[str] | None = None) -> int:
    return entry.run("elastic-srun", lambda: _main(argv))


if __name__ == "__main__":
    sys.exit(main())
