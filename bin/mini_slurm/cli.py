"""Arguments, help and exit codes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from mini_slurm.cluster import Cluster
from mini_slurm.execute import execute
from mini_slurm.faults import heal, links_down, status
from mini_slurm.lifecycle import down, up
from mini_slurm.system import MiniSlurmError, say

DESCRIPTION = """\
A real Slurm of several nodes on one Debian or Ubuntu machine, for tests.

  sudo bin/mini-slurm up                      nodes n1..n4, idle when the command returns
  sudo bin/mini-slurm exec -- srun -N4 hostname
  sudo bin/mini-slurm kill n3                 power loss: nothing leaves n3 any more, not even a TCP reset
  sudo bin/mini-slurm heal n3
  sudo bin/mini-slurm down                    leaves nothing behind but the installed packages

How it is built: one process, the rack, is init of a PID namespace and owns a network namespace with two bridges.
Each machine (login, n1, n2, ...) is an init below the rack with PID, mount, UTS, IPC and network namespaces of
its own. When an init dies its whole machine dies, and when the rack dies everything does. /etc is a private copy
inside the machines, so names, the unprivileged user and Slurm's configuration exist only there.
"""

COMMANDS: dict[str, Callable[[Cluster, argparse.Namespace], int]] = {
    "up": up,
    "down": down,
    "status": status,
    "kill": links_down,
    "cut": links_down,
    "heal": heal,
    "exec": execute,
}
HELP = """\
up: start the cluster; returns when all nodes are idle. Installs Slurm's packages where they are missing (apt-get).
  mini-slurm up
  mini-slurm up --nodes 2 --cpus-per-node 4 --gpus-per-node 0
  mini-slurm up --share /root/project
  mini-slurm up --site
  mini-slurm --slurm /opt/slurm up
down: end and remove everything; harmless when there is nothing.
  mini-slurm down
status: show nodes, daemons and jobs; exit code 0 when up, 3 when not.
  mini-slurm status --json
kill: power loss of a node; links down first, then SIGKILL to all of it. Prints when the links went down (epoch).
  mini-slurm kill n3
cut: network partition; the node runs on without links. Prints when the links went down (epoch).
  mini-slurm cut n3
heal: undo kill or cut; returns when Slurm can use the node again.
  mini-slurm heal n3
exec: run a command as the user minislurm on the login machine; without a command, a shell. Stdio, signals and exit
code are the command's (125: mini-slurm's own errors). It starts in the current directory if the user may, else at
home, with a clean environment.
  mini-slurm exec -- sbatch -N4 --wrap 'srun hostname'
  mini-slurm exec --node n2 --env OMP_NUM_THREADS=1 -- env
  mini-slurm exec --root -- scontrol update NodeName=n2 State=DRAIN Reason=test
  mini-slurm exec
"""


def number_in(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {least} to {most}")
        return int(text)

    return parse


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("mini-slurm", description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    default = os.environ.get("MINI_SLURM_STATE", "/var/lib/mini-slurm")
    text = "directory of the cluster; several clusters can coexist (default: $MINI_SLURM_STATE or /var/lib/mini-slurm)"
    top.add_argument("--state", type=Path, default=default, metavar="DIR", help=text)
    prefix = os.environ.get("MINI_SLURM_PREFIX", "")
    text = "for up: prefix of an installed Slurm (default: $MINI_SLURM_PREFIX, or the Slurm of Debian's packages)"
    top.add_argument("--slurm", default=prefix, metavar="PREFIX", help=text)
    subparsers = top.add_subparsers(required=True, metavar="COMMAND", dest="command_name")
    of = {}
    for name, text, examples in re.findall(r"^(\w+): ((?:.+\n)+?)((?:  .+\n)+)", HELP, re.MULTILINE):
        epilog = f"examples:\n{examples}"
        summary = re.split("[.;]", text)[0]
        kwargs = {"description": text, "epilog": epilog, "formatter_class": raw, "allow_abbrev": False}
        of[name] = subparsers.add_parser(name, help=summary, **kwargs)
    for name in ("kill", "cut", "heal"):
        of[name].add_argument("node", metavar="NODE", help="n1, n2, ...")
    add = of["up"].add_argument
    add("--nodes", type=number_in(1, 64), default=4, metavar="N", help="default: 4")
    add("--cpus-per-node", type=number_in(1, 256), default=2, metavar="K", help="default: 2")
    add("--gpus-per-node", type=number_in(0, 64), default=2, metavar="G", help="fake GPUs (default: 2)")
    add(
        "--site",
        action="store_true",
        help="configure Slurm as sites do: accounting, limits, cgroups, prologs, private data",
    )
    text = "directory to open for jobs although a parent directory is closed (repeatable; default: this checkout)"
    add("--share", action="append", metavar="PATH", help=text)
    of["status"].add_argument("--json", action="store_true", help="print JSON, with the host PIDs of the nodes' inits")
    add = of["exec"].add_argument
    add("--node", default="login", metavar="NODE", help="n1, n2, ... (default: login)")
    add("--root", action="store_true", help="run the command as root, who is a Slurm operator")
    text = "set a variable, or pass NAME on (repeatable)"
    add("--env", action="append", default=[], metavar="NAME=VALUE", help=text)
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="-- and the command with its arguments")
    return top.parse_args()


def main() -> int:
    args = parse_arguments()
    if os.geteuid() != 0:
        say(f"needs root: type  sudo {shlex.join(sys.argv)}")
        return 2
    os.umask(0o022)
    try:
        return COMMANDS[args.command_name](Cluster(Path(os.path.realpath(args.state))), args)
    except (MiniSlurmError, OSError) as error:
        say(f"error: {error}")
        return 125 if args.command_name == "exec" else 1
    except KeyboardInterrupt:
        return 130
