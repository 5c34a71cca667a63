"""``--grow-NAME``: sbatch's option ``--NAME`` for the joiners, the one-node jobs by which a job grows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta

from elastic_hpc.errors import UsageError
from elastic_hpc.options.durations import time_limit
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, REFUSED, SBATCH, Given, Option, is_for_containers, last, named
from elastic_hpc.options.table import ELASTIC

# By line: whether and when the job starts; for how long; what the job has only once; which nodes, and what is counted
# over all nodes; who submits the job, where, and with which environment.
WHOLE_JOB = COMMAND_LINE_ONLY | {
    *("array", "begin", "deadline", "dependency", "hold", "kill-on-invalid-dep", "no-requeue", "priority", "requeue"),
    *("time", "time-min"),
    *("bb", "bbf", "error", "input", "job-name", "licenses", "mail-type", "mail-user", "output"),
    *("batch", "consolidate-segments", "contiguous", "exclude", "gpus", "nodefile", "nodelist", "nodes", "ntasks"),
    *("segment", "spread-job", "spread-segments", "switches", "use-min-nodes", "wait-all-nodes"),
    *("cluster-constraint", "clusters", "export", "export-file", "gid", "uid"),
}
"""Options of the job that its joiners do not have."""

_REFUSED = (WHOLE_JOB | REFUSED.keys() | {"chdir", "no-kill", "open-mode", "signal"}) - {"time", "time-min"}
_INSTEAD = {
    "exclude": "joiners get no node that --exclude names; use --exclude",
    "gpus": "it counts the GPUs of all nodes, and a joiner has one node; use --grow-gpus-per-node=N",
    "nodes": "a joiner has one node; use --nodes MIN:MAX for all nodes of the job",
}
_PREFIX = "grow-"
_ELSEWHERE = frozenset({"partition", "account", "qos"})

COMMON = tuple(f"{_PREFIX}{name}" for name in ("partition", "qos", "account", "constraint", "time"))
"""The options that the help names and the shells complete."""

JOINERS = {
    f"{_PREFIX}{name}": Option(f"{_PREFIX}{name}", value=option.value)
    for name, option in SBATCH.items()
    if name not in COMMAND_LINE_ONLY
}
"""The options for joiners by name, also the refused options."""


def is_for_joiners(name: str) -> bool:
    """Whether ``name`` is an option for joiners, perhaps of a newer sbatch."""
    return name.startswith(_PREFIX) and name not in ELASTIC


def without_prefix(name: str) -> str:
    """The name in sbatch for the option ``name``, if that is an option for joiners; else ``name``."""
    return name.removeprefix(_PREFIX) if is_for_joiners(name) else name


def check_for_joiners(given: Given) -> None:
    """Raise UsageError for an option for joiners that joiners cannot have."""
    name = without_prefix(given.name)
    if name != given.name and (name in _REFUSED or is_for_containers(name)):
        reason = "a joiner is one more node of the job, which decides this for all its nodes; leave it out"
        raise UsageError(f"{given}: {_INSTEAD.get(name, reason)}")


def of_joiners(given: Iterable[Given]) -> tuple[Given, ...]:
    """The options for joiners among ``given``, as options of sbatch."""
    return tuple(replace(g, option=named(without_prefix(g.name))) for g in given if is_for_joiners(g.name))


def are_elsewhere(joiners: Sequence[Given]) -> bool:
    """Whether these options make joiners run under another account or QOS, or in another partition, than the job."""
    return any(given.name in _ELSEWHERE for given in joiners)


def time_of_joiners(joiners: Sequence[Given]) -> timedelta | None:
    """The time limit of joiners with these options; None if the options do not set it."""
    return time_limit(last(joiners, "time") or "")
