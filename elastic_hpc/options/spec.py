"""What a user asks for, parsed once at the edge into a frozen object, and the table of its options. Pure."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

from elastic_hpc.errors import UsageError, argument
from elastic_hpc.options import durations
from elastic_hpc.options.values import (
    DrainSignal,
    Endpoint,
    NodeRange,
    Preload,
    RdzvConf,
    count,
    nproc,
    numa_mode,
    on_off,
    positive,
    ranks,
)


@dataclass(frozen=True)
class LaunchSpec:
    """How the agents run the workers. The same for a batch job, a step in an allocation, and this machine alone."""

    script: str
    script_args: tuple[str, ...] = ()
    module: bool = False
    no_python: bool = False
    nodes: NodeRange = NodeRange(1, 1)
    spares: int = 0
    world_multiple_of: int | None = None
    grow: bool = False
    grow_every: timedelta = timedelta(seconds=60)
    free_growth: bool = False
    wait_for_nodes: timedelta = timedelta(seconds=300)
    nproc_per_node: str | None = None
    max_restarts: int = 10
    max_requeues: int = 5
    rdzv_endpoint: Endpoint = Endpoint()
    rdzv_id: str | None = None
    rdzv_conf: RdzvConf = RdzvConf()
    heartbeat_timeout: timedelta = timedelta(seconds=5)
    grace: timedelta = timedelta(seconds=90)
    drain_signal: DrainSignal | None = None
    hang_timeout: timedelta | None = None
    preload: Preload = Preload()
    preflight: str | None = None
    interface: str | None = None
    role: str | None = None
    local_ranks_filter: str | None = None
    numa_binding: str | None = None

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> LaunchSpec:
        """Build from what ``add_launch_options`` parsed; options that were not given take the defaults above."""
        given = {f.name: getattr(namespace, f.name, None) for f in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        values["script_args"] = tuple(values.get("script_args", ()))
        return cls(**values)

    @property
    def slurm_nodes(self) -> str:
        """The nodes that Slurm is asked for, the spares among them, in sbatch's own notation: ``4-10``."""
        least = self.sizes(int(self._nproc))[0] if self._nproc else self.nodes.min
        return NodeRange(least, self.nodes.max + self.spares).slurm

    def sizes(self, nproc: int) -> tuple[int, ...]:
        """The numbers of nodes that a world may have, ascending, with ``nproc`` workers on each. UsageError if none."""
        multiple = self.world_multiple_of or 1
        sizes = self.nodes.sizes or range(self.nodes.min, self.nodes.max + 1)
        fitting = tuple(nodes for nodes in sizes if nodes * nproc % multiple == 0)
        if not fitting:
            step = multiple // math.gcd(multiple, nproc)
            raise UsageError(
                f"--world-multiple-of {multiple}: no number of nodes in --nodes {self.nodes} fits, with {nproc} "
                f"worker{'s' * (nproc > 1)} on each; expected a multiple of {step}, "
                f"for example --nodes {math.ceil(self.nodes.min / step) * step}"
            )
        return fitting

    def check_sizes(self) -> None:
        """UsageError if no world is possible, where the number of workers on a node is given as a number."""
        if self._nproc:
            self.sizes(int(self._nproc))

    @property
    def _nproc(self) -> str:
        """--nproc-per-node, if it is a number; else that is known on the nodes alone."""
        return self.nproc_per_node if self.nproc_per_node and self.nproc_per_node.isdecimal() else ""

    def options(self) -> list[tuple[str, str]]:
        """The launch options that are set, as ``(--option, value)`` pairs, for a command line."""
        pairs: list[tuple[str, str]] = []
        for option in LAUNCH_OPTIONS:
            value = getattr(self, option.dest)
            if value is not None:
                pairs.append((option.flag, as_text(value, switch=option.is_switch)))
        return pairs

    def command(self) -> list[str]:
        """The tail of an agent's command line: ``[--module | --no-python] -- SCRIPT ARGS``."""
        how = ["--module"] * self.module + ["--no-python"] * self.no_python
        return [*how, "--", self.script, *self.script_args]


def as_text(value: object, *, switch: bool = False) -> str:
    """A value given in Python as a command line would have it; times are in seconds."""
    if switch and isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, timedelta):
        return durations.as_text(value)
    return str(value)


@dataclass(frozen=True)
class LaunchOption:
    """One launch option: the single place for its flag, type and help."""

    flag: str
    metavar: str
    type: Any
    help: str
    letter: str = ""

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off. elastic-sbatch takes it without a value too, a TOML file as true or false."""
        return self.type is on_off

    def parse(self, text: str) -> Any:
        """The value of ``text``. Every refusal names the option, whichever parser refused."""
        try:
            return self.type(text)
        except UsageError as error:
            message = str(error)
            raise UsageError(message if message.startswith("--") else f"{self.flag} {message}") from None


NO_PYTHON = "run SCRIPT itself, which may be any program: nsys, numactl, bash; there are no standbys then"

LAUNCH_OPTIONS = (
    LaunchOption(
        "--nodes",
        "N|MIN:MAX|N,N,...",
        NodeRange.parse,
        "nodes to run on; with MIN:MAX the job starts when MIN are free, uses up to MAX, "
        "and goes on while MIN are left; with 4,6,8 it runs on 4, 6 or 8",
        letter="N",
    ),
    LaunchOption(
        "--spares",
        "K",
        count,
        "K more nodes, which wait ready and step in when one is lost (default: 0)",
    ),
    LaunchOption(
        "--world-multiple-of",
        "K",
        positive,
        "run with a number of workers that is a multiple of K; surplus nodes wait as spares (default: any number)",
    ),
    LaunchOption(
        "--grow",
        "on|off",
        on_off,
        "bring more nodes while the job runs, each by a one-node job of its own, up to MAX and the spares; "
        "lost nodes are replaced (default: off)",
    ),
    LaunchOption(
        "--grow-every",
        "TIME",
        durations.parse,
        "shortest time from one growth to the next, as each growth restarts the workers (default: 60)",
    ),
    LaunchOption(
        "--free-growth",
        "on|off",
        on_off,
        "do not count a restart that makes the world larger against --max-restarts (default: off)",
    ),
    LaunchOption(
        "--wait-for-nodes",
        "TIME",
        durations.parse,
        "how long a job below MIN waits for a replacement that is on its way, workers stopped and nodes kept, "
        "before it is requeued (default: 300)",
    ),
    LaunchOption(
        "--nproc-per-node",
        "gpu|cpu|auto|N",
        nproc,
        "workers on each node; gpu: one per granted GPU, cpu: one per usable core, auto: gpu where there "
        "are GPUs, else cpu (default: gpu where there are GPUs, else 1)",
    ),
    LaunchOption(
        "--max-restarts",
        "N",
        count,
        "restarts of the workers in the whole job before giving up, whatever the cause: failure or "
        "membership change (default: 10)",
    ),
    LaunchOption(
        "--max-requeues",
        "N",
        count,
        "requeues after failures in the whole job before giving up; preemption and the time limit are "
        "not counted (default: 5)",
    ),
    LaunchOption(
        "--rdzv-endpoint",
        "HOST[:PORT]",
        Endpoint.parse,
        "node that hosts the c10d rendezvous, and its port (default: the first host, 29400)",
    ),
    LaunchOption(
        "--rdzv-id",
        "ID",
        str,
        "name of the run that workers see as TORCHELASTIC_RUN_ID (default: the job id; without Slurm a new one)",
    ),
    LaunchOption(
        "--rdzv-conf",
        "KEY=VALUE,...",
        RdzvConf.parse,
        "torchrun's join_timeout and last_call_timeout, in seconds (default: 600 and 30)",
    ),
    LaunchOption(
        "--heartbeat-timeout", "TIME", durations.parse, "silence after which a node is declared lost (default: 5)"
    ),
    LaunchOption(
        "--grace",
        "TIME",
        durations.parse,
        "how long the workers may take to save and stop, when the time limit or a preemption nears, or the user asks "
        "(default: 90)",
    ),
    LaunchOption(
        "--drain-signal",
        "SIGNAL|off",
        DrainSignal.parse,
        "signal that tells workers to save and stop if they never call drain_requested(); a SIGNAL given here is sent "
        "to workers that do not handle it, too; off: none (default: TERM, only to workers that handle it)",
    ),
    LaunchOption(
        "--hang-timeout",
        "TIME",
        durations.parse,
        "declare the workers hung when no worker of a node has reported progress for this long, or written anything if "
        "the script never reports progress; their stacks are kept beside their logs (default: never)",
    ),
    LaunchOption(
        "--preload",
        "MODULE,...|off",
        Preload.parse,
        "modules that the processes of the next workers import while the present ones train, so that a new round "
        "starts at once; off: each worker starts and imports when its round begins (default: torch)",
    ),
    LaunchOption(
        "--preflight",
        "COMMAND",
        str,
        "the site's own check of a node before it takes part, for example a GPU test; a node where it fails stays out",
    ),
    LaunchOption(
        "--interface",
        "IFNAME",
        str,
        "network interface the nodes talk over, for example ib0 (default: the one that Slurm's node name leads to)",
    ),
    LaunchOption("--role", "NAME", str, "what the workers see as ROLE_NAME, as under torchrun (default: default)"),
    LaunchOption(
        "--local-ranks-filter",
        "RANK,...",
        ranks,
        "show only the output of these local ranks of each node; the log files have the output of all (default: all)",
    ),
    LaunchOption(
        "--numa-binding",
        "node|socket|exclusive|core-complex",
        numa_mode,
        "bind each worker to the cores near its GPU, as torchrun does; needs numactl on the nodes (default: not bound)",
    ),
)


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add the launch options, ``-m/--module`` and ``--no-python`` to ``parser``. All default to None: not given."""
    group = parser.add_argument_group("launch options")
    for option in LAUNCH_OPTIONS:
        flags = [option.flag, f"-{option.letter}"] if option.letter else [option.flag]
        group.add_argument(*flags, metavar=option.metavar, type=argument(option.parse), help=option.help)
    group.add_argument(
        "-m", "--module", action="store_true", default=None, help="run SCRIPT as a Python module, like python -m"
    )
    group.add_argument("--no-python", action="store_true", default=None, help=NO_PYTHON)
