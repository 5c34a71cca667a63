"""The options of elastic jobs: one table for the command lines, the configuration files, Python, and the manuals. Pure.

A new option is a row here and a field of ``LaunchSpec``, if the agents need it, or else of ``JobSpec``.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_hpc.errors import UsageError, argument
from elastic_hpc.options import durations
from elastic_hpc.options.sbatch import Given, Option
from elastic_hpc.options.values import (
    DrainSignal,
    Endpoint,
    NodeRange,
    Preload,
    RdzvConf,
    choice,
    container_image,
    container_mounts,
    count,
    interpreter,
    nproc,
    on_off,
    positive,
    ranks,
    setup_line,
    tee,
    variable,
)


@dataclass(frozen=True)
class ElasticOption:
    """One option of elastic jobs: the single place for its name, type and help."""

    name: str
    metavar: str
    """What stands for the value in the help; empty if the option takes no value."""
    type: Any
    """The parser of the value: takes the text, returns the value, raises UsageError."""
    help: str
    letter: str = ""
    elastic_only: bool = False
    """Whether the option has no effect on a plain torchrun, the template of that name."""
    repeated: bool = False
    """Whether the option may be given several times, and each value counts. A TOML file has a list."""

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def flags(self) -> tuple[str, ...]:
        """The forms in which the option is typed, the long one last."""
        return (f"-{self.letter}", self.flag) if self.letter else (self.flag,)

    @property
    def dest(self) -> str:
        """The name in Python."""
        return self.name.replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off. elastic-sbatch takes it without a value too, a TOML file as true or false."""
        return self.type is on_off

    def scanned(self, switch: str = "[=]") -> Option:
        """The option for ``scan``. ``switch``: ``Option.value`` of an option that is on or off."""
        return Option(self.name, self.letter, switch if self.is_switch else "=" if self.metavar else "")

    def parse(self, text: str) -> Any:
        """The value of ``text``. Every refusal names the option, whichever parser refused."""
        try:
            return self.type(text)
        except UsageError as error:
            message = str(error)
            raise UsageError(message if message.startswith("--") else f"{self.flag} {message}") from None


LAUNCH_OPTIONS = (
    ElasticOption("nodes", "N|MIN:MAX|N,N,...", NodeRange.parse, letter="N",
                  help="nodes to run on; with MIN:MAX the job starts when MIN are free, uses up to MAX, and goes on "
                       "while MIN are left; with 4,6,8 it runs on 4, 6 or 8"),
    ElasticOption("spares", "K", count, elastic_only=True,
                  help="K more nodes, which wait ready and step in when one is lost (default: 0)"),
    ElasticOption("world-multiple-of", "K", positive, elastic_only=True,
                  help="run with a number of workers that is a multiple of K; surplus nodes wait as spares "
                       "(default: any number)"),
    ElasticOption("grow", "on|off", on_off, elastic_only=True,
                  help="bring more nodes while the job runs, each by a one-node job of its own, up to MAX and the "
                       "spares; lost nodes are replaced (default: off)"),
    ElasticOption("grow-every", "TIME", durations.parse, elastic_only=True,
                  help="shortest time from one growth to the next, as each growth restarts the workers (default: 60)"),
    ElasticOption("free-growth", "on|off", on_off, elastic_only=True,
                  help="do not count a restart that makes the world larger against --max-restarts (default: off)"),
    ElasticOption("wait-for-nodes", "TIME", durations.parse, elastic_only=True,
                  help="how long a job below MIN waits for a replacement that is on its way, workers stopped and nodes "
                       "kept, before it is requeued (default: 300)"),
    ElasticOption("nproc-per-node", "gpu|cpu|auto|N", nproc,
                  help="workers on each node; gpu: one per granted GPU, cpu: one per usable core, auto: gpu where "
                       "there are GPUs, else cpu (default: gpu where there are GPUs, else 1)"),
    ElasticOption("max-restarts", "N", count,
                  help="restarts of the workers in the whole job before giving up, whatever the cause: failure or "
                       "membership change (default: 10)"),
    ElasticOption("max-requeues", "N", count, elastic_only=True,
                  help="requeues after failures in the whole job before giving up; preemption and the time limit are "
                       "not counted (default: 5)"),
    ElasticOption("rdzv-endpoint", "HOST[:PORT]", Endpoint.parse,
                  help="node that hosts the c10d rendezvous, and its port (default: the first host, 29400)"),
    ElasticOption("rdzv-id", "ID", str,
                  help="name of the run that workers see as TORCHELASTIC_RUN_ID "
                       "(default: the job id; without Slurm a new one)"),
    ElasticOption("rdzv-conf", "KEY=VALUE,...", RdzvConf.parse,
                  help="torchrun's join_timeout and last_call_timeout, in seconds (default: 600 and 30)"),
    ElasticOption("heartbeat-timeout", "TIME", durations.parse, elastic_only=True,
                  help="silence after which a node is declared lost (default: 5)"),
    ElasticOption("grace", "TIME", durations.parse, elastic_only=True,
                  help="how long the workers may take to save and stop, when the time limit or a preemption nears, or "
                       "the user asks (default: 90)"),
    ElasticOption("drain-signal", "SIGNAL|off", DrainSignal.parse, elastic_only=True,
                  help="signal that tells workers to save and stop if they never call drain_requested(); a SIGNAL "
                       "given here is sent to workers that do not handle it, too; off: none "
                       "(default: TERM, only to workers that handle it)"),
    ElasticOption("hang-timeout", "TIME", durations.parse, elastic_only=True,
                  help="declare the workers hung when no worker of a node has reported progress for this long, or "
                       "written anything if the script never reports progress; their stacks are kept beside their logs "
                       "(default: never)"),
    ElasticOption("preload", "auto|MODULE,...|off", Preload.parse, elastic_only=True,
                  help="modules that the processes of the next workers import while the present ones train, so that a "
                       "new round starts at once; auto: torch, and what the script is seen to import, installed "
                       "packages only; off: each worker starts and imports when its round begins (default: auto)"),
    ElasticOption("preflight", "COMMAND", str, elastic_only=True,
                  help="the site's own check of a node before it takes part, for example a GPU test; a node where it "
                       "fails stays out"),
    ElasticOption("interface", "IFNAME", str, elastic_only=True,
                  help="network interface the nodes talk over, for example ib0 "
                       "(default: the one that Slurm's node name leads to)"),
    ElasticOption("role", "NAME", str, help="what the workers see as ROLE_NAME, as under torchrun (default: default)"),
    ElasticOption("tee", "all|RANK,FIRST-LAST,...", tee,
                  help="ranks whose output is shown in the job's output too; the log files have the output of all; "
                       "torchrun's 1, 2, 3 and RANK:3 mean all here (default: 0)"),
    ElasticOption("local-ranks-filter", "RANK,...", ranks,
                  help="of the ranks of --tee, or else of all, show only the output of these local ranks of each node; "
                       "the log files have the output of all (default: all)"),
    ElasticOption("numa-binding", "node|socket|exclusive|core-complex",
                  choice("node", "socket", "exclusive", "core-complex"),
                  help="bind each worker to the cores near its GPU, as torchrun does; needs numactl on the nodes "
                       "(default: not bound)"),
)  # fmt: skip
"""How the agents run the workers."""

JOB_OPTIONS = (
    ElasticOption("log-dir", "DIR", str,
                  help="parent of the jobs' run directories, on a file system that all nodes share "
                       "(default: ./elastic-logs)"),
    ElasticOption("setup", "LINE", setup_line, repeated=True,
                  help="shell line for the first node, before the agents start: 'module load cuda', 'source env.sh'; "
                       "may be repeated"),
    ElasticOption("env", "NAME=VALUE", variable, repeated=True,
                  help="environment variable for the workers; may be repeated"),
    ElasticOption("python", "PATH", interpreter,
                  help="interpreter of the agents and the workers (default: the one that runs elastic-sbatch; in a "
                       "container python3)"),
    ElasticOption("container-image", "IMAGE", container_image,
                  help="run the agents and the workers in a container, the batch script outside; elastic_hpc must be "
                       "installed in it"),
    ElasticOption("container-mounts", "SRC:DST[:FLAGS],...", container_mounts,
                  help="folders of the nodes that the container sees, besides the working directory and the run "
                       "directory"),
    ElasticOption("container-runtime", "pyxis|apptainer|oci", choice("pyxis", "apptainer", "oci"),
                  help="what runs the container; oci is Slurm's own --container, and IMAGE the folder of an OCI bundle "
                       "(default: apptainer for an IMAGE that ends in .sif, else pyxis)"),
    ElasticOption("snapshot", "on|off", on_off, elastic_only=True,
                  help="run a copy, made now, of the files that git tracks, so that later changes do not reach the job "
                       "(default: off)"),
    ElasticOption("template", "NAME|FILE", str,
                  help="elastic, torchrun (the quickstart's plain command), or a Jinja2 file of your own "
                       "(default: elastic)"),
)  # fmt: skip
"""Options of a submission. The agents do not see them."""

SCRIPT_SWITCHES = (
    ElasticOption("module", "", bool, letter="m", help="run SCRIPT as a Python module, like python -m"),
    ElasticOption("no-python", "", bool,
                  help="run SCRIPT itself, which may be any program: nsys, numactl, bash; there are no standbys then"),
)  # fmt: skip
"""What SCRIPT is."""

ELASTIC = {option.name: option for option in (*LAUNCH_OPTIONS, *JOB_OPTIONS)}
"""The options that have a value, by name: the keys of a configuration file, and keyword arguments in Python."""

NOT_FOR_TORCHRUN = ("signal", *(option.name for option in ELASTIC.values() if option.elastic_only))
"""Options that have no effect on a plain torchrun, the template of that name; also sbatch's --signal."""


@dataclass(frozen=True)
class Layer:
    """The options from one source: ours by name, and sbatch's."""

    source: str
    options: Sequence[tuple[str, str]]
    sbatch: Sequence[Given] = ()
    unset: Collection[str] = ()
    """Options of sbatch that the layers below are not to set."""


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add the launch options, ``-m/--module`` and ``--no-python`` to ``parser``. All default to None: not given."""
    group = parser.add_argument_group("launch options")
    for option in LAUNCH_OPTIONS:
        flags = reversed(option.flags)
        group.add_argument(*flags, metavar=option.metavar, type=argument(option.parse), help=option.help)
    for switch in SCRIPT_SWITCHES:
        group.add_argument(*switch.flags, action="store_true", default=None, help=switch.help)
