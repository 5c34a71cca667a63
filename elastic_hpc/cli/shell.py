"""``elastic-hpc shell``: a shell, or a command, on a node of a running job."""

from __future__ import annotations

import argparse
import sys

from elastic_hpc import slurm
from elastic_hpc.cli.jobs import add_job, single
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.job.look import Jobs
from elastic_hpc.start import module_command

HELP = "open a shell on a node of a running job, beside the workers and in their environment"
EPILOG = """examples:
  elastic-hpc shell 4711                           on the leader's node
  elastic-hpc shell 4711 n3                        on n3
  elastic-hpc shell 4711 n3 -- nvidia-smi          one command
  elastic-hpc shell 4711 n3 -- py-spy dump --pid 4242

The shell is a job step of its own (srun --overlap), with the job's GPUs, CPUs and memory, in the folder and with the
variables of the job's agent there. It ends with the job; the job does not notice the end of the shell. With
--container-image the shell is outside of the container. To follow the output only: elastic-hpc logs JOB -f."""
EXCEPTIONS = "With COMMAND, the exit code is that of COMMAND."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("node", metavar="NODE", nargs="?", help="Slurm's name of the node (default: the leader's node)")
    parser.add_argument("command_line", metavar="COMMAND", nargs="*", help="after --: run COMMAND instead of a shell")


def run(args: argparse.Namespace) -> int:
    rundir = single("shell", args.job)
    ((view, *_),) = Jobs([rundir]).look()
    if rundir.is_held() is not None:
        raise UsageError(f"job {view.id} runs without Slurm, on this machine: open a shell here")
    if view.state != "RUNNING":
        raise ElasticError(f"job {view.id} is {view.summary}: a shell needs a running job")
    nodes = slurm.nodes_of(view.slurm_id)
    node = args.node or next((name for name in (view.leader, *view.nodes, *nodes) if name in nodes), "")
    if node not in nodes:
        raise UsageError(f"{node or 'NODE'}: expected a node of job {view.id}: {' '.join(nodes) or 'Slurm names none'}")
    inside = module_command(sys.executable, "elastic_hpc", "inside", str(rundir.path), *args.command_line)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not (terminal or args.command_line):
        raise UsageError("there is no terminal for a shell; expected a command: elastic-hpc shell JOB NODE -- COMMAND")
    slurm.enter(nodes[node], node, inside, terminal=terminal)
