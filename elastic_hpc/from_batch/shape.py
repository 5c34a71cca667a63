"""Nodes, workers, GPUs and cores of a batch script's job, and its other options of sbatch. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.wrappers import Launch
from elastic_hpc.options.sbatch import (
    COMMAND_LINE_ONLY,
    INSTEAD_OF_CONTAINER,
    SBATCH,
    Given,
    WarningSignal,
    check,
    is_for_containers,
)
from elastic_hpc.options.values import number

_TASKS = ("ntasks-per-node", "tasks-per-node", "ntasks")
_ALL_TASKS = "a node's agent needs what all its tasks need"
_SHAPE = ("nodes", *_TASKS, "gpus-per-task", "gpus", "cpus-per-task")


class Shape:
    """Nodes, workers, GPUs and cores. Batch scripts count tasks; an elastic job has one task a node, the agent."""

    def __init__(self, given: Sequence[Given], launch: Launch, place: str) -> None:
        self.notes: list[str] = []
        self.cpus_of_a_task = ""
        """SLURM_CPUS_PER_TASK in the batch script's job, if the elastic job has another number."""
        self.options = [(name, value, place) for name, value in launch.options if name != "nodes"]
        self._by_torchrun = launch.kind != "python"
        directives = {option.name: option for option in given}
        of_srun = [replace(option, source=place) for option in launch.srun if option.name in _SHAPE]
        step = {option.name: option for option in of_srun}
        self._all = {**step, **directives}
        self._by_srun = launch.by_srun
        self._nodes(dict(launch.options).get("nodes", ""), place)
        in_step = self._tasks_per_node(step) or self._tasks_per_node(directives) or 1
        in_job = self._tasks_per_node(directives) or in_step
        self.sbatch: list[Given] = []
        for option in [*of_srun, *given]:
            if option is self._all.get(option.name) and option.name != "nodes":
                self._take(option, in_job if option in given else in_step)
        self._cpus(in_job)
        if not self._by_torchrun and in_step > 1 and "nproc-per-node" not in dict(launch.options):
            self.options.append(("nproc-per-node", str(in_step), place))
        if launch.by_srun:
            self.notes.append(f"{place}: dropped srun and its options: elastic-sbatch writes its own srun line")

    def _tasks_per_node(self, options: Mapping[str, Given]) -> int:
        """Tasks on each node; 0 if ``options`` do not say."""
        tasks, nodes = _number(options, "ntasks"), self._fixed
        by_total = tasks // nodes if nodes and tasks % nodes == 0 else 0
        return _number(options, "ntasks-per-node", "tasks-per-node") or by_total

    def _nodes(self, of_torchrun: str, place: str) -> None:
        if (nodes := self._all.get("nodes")) and ":" not in of_torchrun:
            text, source = re.sub(r"^(\d+)-(\d+)$", r"\1:\2", nodes.value or ""), nodes.source
        elif of_torchrun:
            text, source = of_torchrun, place
        elif (tasks := _number(self._all, "ntasks")) and (self._by_srun or not self._by_torchrun):
            per_node = _number(self._all, "ntasks-per-node", "tasks-per-node") or (1 if self._by_torchrun else 0)
            if not per_node:
                source = self._all["ntasks"].source
                raise UsageError(f"{source}: --ntasks={tasks}: on how many nodes? Give --nodes on the command line")
            text, source = str(-(-tasks // per_node)), self._all["ntasks"].source
        else:
            text, source = "1", place
        self.options.append(("nodes", text, source))
        self._fixed = number(text) or 0

    def _cpus(self, tasks: int) -> None:
        """Request a CPU for each of a node's tasks, as Slurm grants without an option. --cpus-per-task would also be an
        upper limit at a site that grants whole nodes.
        """
        named = {"cpus-per-task", "cpus-per-gpu", "exclusive", "mincpus"} & self._all.keys()
        if tasks > 1 and not named:
            source = next(self._all[name].source for name in _TASKS if name in self._all)
            added = Given(SBATCH["mincpus"], str(tasks), source)
            self.notes.append(f"{source}: added {added}: {_ALL_TASKS}")
            self.sbatch.append(added)

    def _take(self, given: Given, per_node: int) -> None:
        name, value, nodes = given.name, given.value or "", self._fixed
        if name in _TASKS:
            self._drop(given, "elastic-sbatch starts one agent on each node, and the agent starts the workers there")
        elif name == "gpus-per-task":
            self._change(given, "gpus-per-node", _times(value, per_node))
        elif name == "gpus" and nodes and (on_a_node := _divided(value, nodes)):
            self._change(given, "gpus-per-node", on_a_node)
        elif name == "cpus-per-task" and per_node > 1 and number(value):
            self.cpus_of_a_task = value
            self._change(given, "cpus-per-task", str(int(value) * per_node))
        elif name in COMMAND_LINE_ONLY:
            self._drop(given, "it belongs on the command line")
        elif name == "signal" and not value.startswith("B:"):
            self._signal(given)
        elif is_for_containers(name):
            self._drop(given, INSTEAD_OF_CONTAINER)
        else:
            try:
                if check(given):
                    self.sbatch.append(given)
                else:
                    self._drop(given, "elastic-sbatch sets it anyway")
            except UsageError as error:
                self._drop(given, str(error).partition(": ")[2])

    def _signal(self, given: Given) -> None:
        """Slurm sends the signal to the tasks. In the batch script these are the workers."""
        word, _, seconds = (given.value or "").upper().rpartition(":")[2].partition("@")
        warning = replace(given, value=f"{WarningSignal.name}@{seconds or 60}")
        drain = f"--drain-signal={word}"
        self.notes.append(
            f"{given.source}: changed {given} to {warning} and {drain}: the agents pass the warning on to the workers"
        )
        self.options.append(("drain-signal", word, given.source))
        self.sbatch.append(warning)

    def _drop(self, given: Given, reason: str) -> None:
        self.notes.append(f"{given.source}: dropped {given}: {reason}")

    def _change(self, given: Given, name: str, value: str) -> None:
        changed = replace(given, option=SBATCH[name], value=value)
        self.notes.append(f"{given.source}: changed {given} to {changed}: {_ALL_TASKS}")
        self.sbatch.append(changed)


def _number(options: Mapping[str, Given], *names: str) -> int:
    """The number in the first option of ``names`` that has a number, else 0."""
    values = [options[name].value or "" for name in names if name in options]
    return next(filter(None, map(number, values)), 0)


def _times(count: str, tasks: int) -> str:
    """``count``, such as ``2`` or ``a100:2``, multiplied by ``tasks``."""
    kind, colon, text = count.rpartition(":")
    of_a_task = number(text)
    return count if of_a_task is None else f"{kind}{colon}{of_a_task * tasks}"


def _divided(count: str, nodes: int) -> str:
    kind, colon, text = count.rpartition(":")
    of_all = number(text)
    return f"{kind}{colon}{of_all // nodes}" if of_all and of_all % nodes == 0 else ""
