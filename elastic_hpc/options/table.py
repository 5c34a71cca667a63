"""The options of elastic jobs: one table for the command lines, the configuration files, Python, and the manuals. Pure.

A new option is a row here and a field of ``LaunchSpec``, if the agents need it, or else of ``JobSpec``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from elastic_hpc.errors import UsageError, argument
from elastic_hpc.options import durations
from elastic_hpc.options.sbatch import Given, Option
from elastic_hpc.options.values import (
    DrainSignal,
    Endpoint,
    HangTimeout,
    NodeRange,
    Preload,
    RdzvConf,
    SlowNode,
    absolute,
    choice,
    container_image,
    container_mounts,
    count,
    interpreter,
    notify,
    nproc,
    on_off,
    positive,
    ranks,
    setup_line,
    tee,
    variable,
    yield_to,
)

if TYPE_CHECKING:
    import argparse  # slow to import, and elastic-sbatch does not need it


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
    submitted_only: bool = False
    """Whether the option has no effect in an allocation of the user: ``elastic-srun``."""
    repeated: bool = False
    """Whether the option may be given several times, and each value counts. A TOML file has a list."""

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def flags(self) -> tuple[str, ...]:
        """The forms in which the option is typed, the long form last."""
        return (f"-{self.letter}", self.flag) if self.letter else (self.flag,)

    @property
    def dest(self) -> str:
        """The name in Python."""
        return self.name.replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """Whether the option is a switch, on or off. A command line may omit the value; TOML has true or false."""
        return self.type is on_off

    def scanned(self) -> Option:
        """The option for ``scan``."""
        return Option(self.name, self.letter, "[=]" if self.is_switch else "=" if self.metavar else "", self.metavar)

    def parse(self, text: str) -> Any:
        """The value of ``text``. Every error names the option, whichever parser raises it."""
        try:
            return self.type(text)
        except UsageError as error:
            message = str(error)
            raise UsageError(message if message.startswith("--") else f"{self.flag} {message}") from None


LAUNCH_OPTIONS = (
    ElasticOption("nodes", "N|MIN:MAX|N,N,...", NodeRange.parse, letter="N",
                  help="number of nodes; MIN:MAX: the job starts when MIN nodes are free, uses up to MAX, and "
                       "continues while MIN nodes remain; 4,6,8: the job runs on exactly 4, 6 or 8 nodes"),
    ElasticOption("spares", "K", count, elastic_only=True,
                  help="K spare nodes, which wait without workers and replace lost nodes at once (default: 0)"),
    ElasticOption("world-multiple-of", "K", positive, elastic_only=True,
                  help="the number of workers must be a multiple of K; surplus nodes wait as spares "
                       "(default: any number)"),
    ElasticOption("grow", "on|off", on_off, elastic_only=True, submitted_only=True,
                  help="add nodes while the job runs, up to MAX plus the spares, and replace lost nodes; each new node "
                       "comes through a one-node Slurm job (default: off)"),
    ElasticOption("grow-every", "TIME", durations.parse, elastic_only=True,
                  help="minimum time between two growths; each growth restarts the workers (default: 60 s)"),
    ElasticOption("free-growth", "on|off", on_off, elastic_only=True,
                  help="do not count restarts caused by growth against --max-restarts (default: off)"),
    ElasticOption("yield-to", "pending|qos:NAME|partition:NAME|user", yield_to, elastic_only=True, submitted_only=True,
                  help="release nodes above MIN while another job is pending for them: any job, a job of this QOS or "
                       "partition, or another job of the same user; with --grow the job grows again afterwards "
                       "(default: never)"),
    ElasticOption("yield-every", "TIME", durations.parse, elastic_only=True, submitted_only=True,
                  help="minimum time between two releases of nodes for other jobs (default: 600 s)"),
    ElasticOption("wait-for-nodes", "TIME", durations.parse, elastic_only=True,
                  help="time that a job below MIN waits for a replacement that is on its way before the job is "
                       "requeued; meanwhile the job keeps its nodes and stops its workers (default: 300 s)"),
    ElasticOption("nproc-per-node", "gpu|cpu|auto|N", nproc,
                  help="workers on each node; gpu: one per allocated GPU, cpu: one per usable core, auto: gpu where "
                       "there are GPUs, else cpu (default: gpu where there are GPUs, else 1)"),
    ElasticOption("max-restarts", "N", count,
                  help="maximum number of worker restarts in the whole job, for failures, lost nodes and growth; "
                       "stops before the time limit, and nodes that you release, are not counted (default: 10)"),
    ElasticOption("max-requeues", "N", count, elastic_only=True, submitted_only=True,
                  help="maximum number of requeues after failures in the whole job; requeues after a preemption or "
                       "at the time limit are not counted (default: 5)"),
    ElasticOption("rdzv-endpoint", "HOST[:PORT]", Endpoint.parse,
                  help="node that hosts the rendezvous at first, and the first of the job's ports "
                       "(default: the job's first node, 29400)"),
    ElasticOption("rdzv-id", "ID", str,
                  help="run ID, which workers see as TORCHELASTIC_RUN_ID "
                       "(default: the job ID; without Slurm a new ID)"),
    ElasticOption("rdzv-conf", "KEY=VALUE,...", RdzvConf.parse,
                  help="torchrun's join_timeout and last_call_timeout (default: 600 s and 30 s)"),
    ElasticOption("heartbeat-timeout", "TIME", durations.parse, elastic_only=True,
                  help="time without a heartbeat before a node is declared lost (default: 5 s)"),
    ElasticOption("grace", "TIME", durations.parse, elastic_only=True,
                  help="time that the workers have to save and stop before the time limit, a preemption, a growth or "
                       "another drain (default: 90 s)"),
    ElasticOption("drain-signal", "SIGNAL|off", DrainSignal.parse, elastic_only=True,
                  help="signal that asks workers to save and stop if they never call drain_requested(); an explicit "
                       "SIGNAL is sent even to workers without a handler for it; off: send no signal "
                       "(default: TERM, only to workers with a handler for it)"),
    ElasticOption("hang-timeout", "auto|TIME|off", HangTimeout.parse, elastic_only=True,
                  help="silence after which the workers are declared hung; the job saves their stacks beside their "
                       "logs, and restarts them. TIME: for so long no worker of a node has reported progress or, if "
                       "the script never reports progress, written output. auto: no worker of any node has reported or "
                       "written for 10 times the longest silence so far, at least 5 minutes, longer in the first "
                       "steps of a round and while workers compute or write, no limit for a script that gives no sign "
                       "of life. off: no limit (default: auto)"),
    ElasticOption("slow-node", "FACTOR[:leave]|off", SlowNode.parse, elastic_only=True,
                  help="report a node whose workers take FACTOR times as long as those of the other nodes from the "
                       "start of a step to its first collective; FACTOR:leave: the job also leaves that node at a step "
                       "boundary, as soon as it can continue without the node, and avoids the node; only for scripts "
                       "that use live or time_steps, or report own_seconds (default: 1.5)"),
    ElasticOption("preload", "auto|MODULE,...|off", Preload.parse, elastic_only=True,
                  help="modules that standby processes import while the workers train, so that a new round starts "
                       "at once; auto: torch and the installed packages that the script imports; off: no standby "
                       "processes (default: auto)"),
    ElasticOption("preflight", "COMMAND", str, elastic_only=True,
                  help="the site's own check, for example a GPU test; a node on which COMMAND fails does not join the "
                       "job"),
    ElasticOption("health-dir", "DIR", absolute, elastic_only=True,
                  help="folder where the site marks failing nodes: if DIR/segment_health_check.NODE is not empty, the "
                       "job leaves NODE (default: none)"),
    ElasticOption("interface", "IFNAME", str, elastic_only=True,
                  help="network interface between the nodes, for example ib0 "
                       "(default: the interface of the address that Slurm's node name resolves to)"),
    ElasticOption("role", "NAME", str, help="value of ROLE_NAME in the workers, as under torchrun (default: default)"),
    ElasticOption("tee", "all|RANK,FIRST-LAST,...", tee,
                  help="ranks whose output is copied to the job's output; the log files have the output of all ranks; "
                       "torchrun's values 1, 2, 3 and RANK:3 mean all here (default: 0)"),
    ElasticOption("local-ranks-filter", "RANK,...", ranks,
                  help="local ranks whose output is copied to the job's output, among the ranks of --tee or, without "
                       "--tee, among all ranks; the log files have the output of all ranks (default: all)"),
    ElasticOption("numa-binding", "node|socket|exclusive|core-complex",
                  choice("node", "socket", "exclusive", "core-complex"),
                  help="bind each worker to the cores near its GPU, as torchrun does; needs numactl on the nodes "
                       "(default: no binding)"),
)  # fmt: skip
"""How the agents run the workers."""

_THERE = {
    "max-restarts": "maximum number of worker restarts in the whole run, for failures, lost nodes and nodes that "
                    "return (default: 10)",
    "grow-every": "minimum time between two restarts of the workers for nodes that return (default: 60 s)",
    "free-growth": "do not count restarts for nodes that return against --max-restarts (default: off)",
    "wait-for-nodes": "time that a run below MIN waits for a node whose agent is being restarted before the run fails; "
                      "meanwhile the workers are stopped; only in an allocation: --local and --standalone restart no "
                      "agent (default: 300 s)",
    "grace": "time that the workers have to save and stop at Ctrl-C, SIGTERM or another drain (default: 90 s)",
}  # fmt: skip
"""The help of options that mean something else there: nothing is requeued, and only nodes of the allocation come."""
IN_ALLOCATION = tuple(
    replace(option, help=_THERE.get(option.name, option.help)) for option in LAUNCH_OPTIONS if not option.submitted_only
)
"""Launch options that have an effect in an allocation of the user, or without Slurm."""
WITHOUT_SLURM = tuple(option for option in IN_ALLOCATION if option.name != "wait-for-nodes")
"""Launch options that have an effect without Slurm, where no agent is restarted on a lost node."""

JOB_OPTIONS = (
    ElasticOption("log-dir", "DIR", str,
                  help="parent folder of the run directories, on a file system that all nodes share "
                       "(default: ./elastic-logs)"),
    ElasticOption("setup", "LINE", setup_line, repeated=True,
                  help="shell line that the first node runs before the agents start: 'module load cuda', "
                       "'source env.sh'; the variables that it exports reach all agents and workers; may be repeated"),
    ElasticOption("env", "NAME=VALUE", variable, repeated=True,
                  help="environment variable for the workers; may be repeated"),
    ElasticOption("python", "PATH", interpreter,
                  help="Python interpreter of the agents and the workers (default: the interpreter of elastic-sbatch; "
                       "in a container python3)"),
    ElasticOption("container-image", "IMAGE", container_image,
                  help="run the agents and the workers in a container from IMAGE, which must have elastic_hpc "
                       "installed; the batch script runs outside"),
    ElasticOption("container-mounts", "SRC:DST[:FLAGS],...", container_mounts,
                  help="folders of the node to mount in the container, besides the working directory and the run "
                       "directory"),
    ElasticOption("container-runtime", "pyxis|apptainer|oci", choice("pyxis", "apptainer", "oci"),
                  help="container runtime; oci: Slurm's own --container, with the folder of an OCI bundle as IMAGE "
                       "(default: apptainer for an IMAGE that ends in .sif, else pyxis)"),
    ElasticOption("snapshot", "on|off", on_off, elastic_only=True,
                  help="copy the files that git tracks now, and run the copy, so that later edits do not affect the "
                       "job (default: off)"),
    ElasticOption("notify", "COMMAND|URL", notify, elastic_only=True,
                  help="notify when the job ends, returns to the queue, or makes no progress: run COMMAND with the "
                       "text on its stdin, or post JSON to a webhook, in the form that Slack accepts (default: no "
                       "notification)"),
    ElasticOption("notify-after", "TIME", durations.parse, elastic_only=True,
                  help="time without a new step after which --notify says that the job makes no progress "
                       "(default: 30m)"),
    ElasticOption("template", "NAME|FILE", str,
                  help="template of the batch script: elastic, torchrun (plain torchrun, not elastic), or your own "
                       "Jinja2 file (default: elastic)"),
)  # fmt: skip
"""Options of a submission. The agents do not see them."""

SCRIPT_SWITCHES = (
    ElasticOption("module", "", bool, letter="m", help="run SCRIPT as a Python module, as python -m does"),
    ElasticOption("no-python", "", bool,
                  help="SCRIPT is any program, for example nsys, numactl or bash; disables standby processes"),
)  # fmt: skip
"""What SCRIPT is."""

ABOUT_SWITCHES = (
    ElasticOption("help", "", bool, "show this help and exit", letter="h"),
    ElasticOption("version", "", bool, "show the version and exit", letter="V"),
)
"""Switches by which a command describes itself."""

ELASTIC = {option.name: option for option in (*LAUNCH_OPTIONS, *JOB_OPTIONS)}
"""The options that have a value, by name: the keys of a configuration file, and keyword arguments in Python."""

NEEDS = {
    "yield-every": "yield-to",
    "notify-after": "notify",
    "container-mounts": "container-image",
    "container-runtime": "container-image",
}
"""Options that have no effect without another one."""

NOT_FOR_TORCHRUN = ("signal", *(option.name for option in ELASTIC.values() if option.elastic_only))
"""Options that have no effect on a plain torchrun, the template of that name; also sbatch's --signal."""


@dataclass(frozen=True)
class Layer:
    """The options from one source: our options by name, and sbatch's options."""

    source: str
    options: Sequence[tuple[str, str]]
    sbatch: Sequence[Given] = ()
    unset: Collection[str] = ()
    """Options of sbatch that this layer unsets, whatever the layers below set."""


def refuse_switch_apart(given: Sequence[Given], rest: Sequence[str]) -> None:
    """Raise UsageError for ``--grow on train.py``, which would run a script named "on"."""
    if given and given[-1].name in ELASTIC and given[-1].value is None and rest[:1] in (["on"], ["off"]):
        shown = f"{given[-1].flag} {rest[0]}"
        raise UsageError(f"{shown}: expected the value after '=', for example {shown.replace(' ', '=')}")


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add the launch options, ``-m/--module`` and ``--no-python`` to ``parser``. All default to None: not given."""
    group = parser.add_argument_group("launch options")
    for option in LAUNCH_OPTIONS:
        flags = reversed(option.flags)
        group.add_argument(*flags, metavar=option.metavar, type=argument(option.parse), help=option.help)
    for switch in SCRIPT_SWITCHES:
        group.add_argument(*switch.flags, action="store_true", default=None, help=switch.help)
