"""The launch options of a job, parsed once, in a frozen object. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from elastic_hpc.errors import UsageError
from elastic_hpc.options import durations
from elastic_hpc.options.table import LAUNCH_OPTIONS, NEEDS
from elastic_hpc.options.values import DrainSignal, Endpoint, HangTimeout, NodeRange, Preload, RdzvConf, SlowNode

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class LaunchSpec:
    """How the agents run the workers: in a batch job, in a step of an allocation, or on this machine alone."""

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
    yield_to: str | None = None
    yield_every: timedelta = timedelta(seconds=600)
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
    hang_timeout: HangTimeout = HangTimeout()
    slow_node: SlowNode = SlowNode()
    preload: Preload = Preload()
    preflight: str | None = None
    health_dir: str | None = None
    interface: str | None = None
    role: str | None = None
    tee: str | None = None
    local_ranks_filter: str | None = None
    numa_binding: str | None = None

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> LaunchSpec:
        """The options that ``add_launch_options`` parsed. An option that was not given has its default."""
        given = {f.name: getattr(namespace, f.name, None) for f in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        values["script_args"] = tuple(values.get("script_args", ()))
        return cls(**values)

    @classmethod
    def of_nodes(cls, options: Mapping[str, str]) -> LaunchSpec:
        """A spec with the numbers of nodes in ``options``, which are as in ``spec.json``. Raises UsageError, and
        ValueError if the options are damaged.
        """
        return cls(
            script="",
            nodes=NodeRange.parse(options.get("--nodes", "1:1")),
            spares=int(options.get("--spares", 0)),
            world_multiple_of=int(options.get("--world-multiple-of", 1)),
            nproc_per_node=options.get("--nproc-per-node"),
        )

    def resized(self, least: int, most: int) -> LaunchSpec:
        """This spec with other bounds: a world may have ``least`` to ``most`` nodes."""
        return replace(self, nodes=NodeRange(least, most), world_multiple_of=None)

    @property
    def most_nodes(self) -> int:
        """The most nodes that the job may have, spares included."""
        return self.nodes.max + self.spares

    def asks_slurm(self, *, grows_elsewhere: bool) -> NodeRange:
        """The number of nodes that the job requests at the start, spares included. ``grows_elsewhere``: all nodes above
        MIN come from another partition, account or QOS.
        """
        least = self.sizes(int(self._nproc))[0] if self._nproc else self.nodes.min
        return NodeRange(least, least if grows_elsewhere else self.most_nodes)

    def sizes(self, nproc: int) -> tuple[int, ...]:
        """The numbers of nodes that a world may have, ascending, with ``nproc`` workers on each node. Raises UsageError
        if there is no such number.
        """
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
        """Raise UsageError if no world is possible. Without a number in --nproc-per-node, only the nodes know that."""
        if self._nproc:
            self.sizes(int(self._nproc))

    @property
    def _nproc(self) -> str:
        """The value of --nproc-per-node if it is a number, else empty: then only the nodes know the number."""
        return self.nproc_per_node if self.nproc_per_node and self.nproc_per_node.isdecimal() else ""

    def options(self) -> list[tuple[str, str]]:
        """The launch options that are set and have an effect, as ``(--option, value)`` pairs, for a command line."""
        given = {option.name: getattr(self, option.dest) for option in LAUNCH_OPTIONS}
        needed = {name: value for name, value in given.items() if given.get(NEEDS.get(name, name)) is not None}
        return [(f"--{name}", as_text(value)) for name, value in needed.items() if value is not None]

    def command(self) -> list[str]:
        """The tail of an agent's command line: ``[--module | --no-python] -- SCRIPT ARGS``."""
        how = ["--module"] * self.module + ["--no-python"] * self.no_python
        return [*how, "--", self.script, *self.script_args]


def as_text(value: object) -> str:
    """``value`` as on a command line; times are in seconds."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return durations.as_text(value) if isinstance(value, timedelta) else str(value)
