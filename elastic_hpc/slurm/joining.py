"""Joiners: one-node jobs that a running job, their parent, submits to grow."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from elastic_hpc.environment import JOIN
from elastic_hpc.errors import SlurmError, UsageError
from elastic_hpc.options import sbatch_lines
from elastic_hpc.options.of_joiners import time_of_joiners
from elastic_hpc.slurm import client, directives
from elastic_hpc.slurm.job import show_job
from elastic_hpc.slurm.states import duration
from elastic_hpc.slurm.submit import submit_script

_NAME = "join-{parent}"
_NAMES = re.compile(r"join-\d+(_\d+)?")
_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Joiner:
    """A job that waits for its node, or whose node takes part in the parent's world."""

    id: str
    state: str
    """Slurm's word; COMPLETING until its node is free again."""
    node: str
    """Empty while the job waits."""
    reason: str
    """Why the job waits, in Slurm's words."""
    excluded: str
    """Nodes that the job must not get, in Slurm's notation."""
    time_limit: timedelta | None
    """None for no limit."""


def is_joiner(name: str) -> bool:
    """Whether a job of this name is a joiner, of any parent."""
    return bool(_NAMES.fullmatch(name))


def joiners(parent: str) -> tuple[Joiner, ...]:
    """The joiners of ``parent`` that wait or hold a node, from any leader. Raises SlurmError."""
    answer = client.run(
        "squeue", "--noheader", "--me", f"--name={_NAME.format(parent=parent)}", "--format=%A|%T|%N|%x|%l|%r"
    )
    return tuple(map(_joiner, answer.splitlines()))


def _joiner(line: str) -> Joiner:
    try:
        id, state, node, excluded, limit, reason = line.split("|", 5)  # the reason may be any text
    except ValueError:
        raise SlurmError(f"squeue: expected six fields, not {line!r}") from None
    node, excluded = ("" if nodes == "(null)" else nodes for nodes in (node, excluded))
    return Joiner(id, state, node, reason, excluded, duration(limit))


def submit_joiner(
    parent: str, script: bytes, *, environ: Mapping[str, str], run_dir: Path, log: Path, exclude: Collection[str]
) -> str | None:
    """Submit a joiner of the running job ``parent`` and return its id; None if ``parent`` ends within a minute.

    ``script`` is the parent's batch script. The joiner runs it with ELASTIC_HPC_JOIN=``run_dir`` in ``environ``, with
    the directives that make sense for one node, and with the options in the #GROW lines, which override these. The
    joiner gets no node in ``exclude`` and no node that the script excludes, and must end when ``parent`` does. ``log``
    may contain %j. Raises UsageError if Slurm refuses the job, SlurmError if Slurm does not answer.
    """
    shown, given = show_job(parent), sbatch_lines.options(script, "script.sbatch", sbatch_lines.FOR_JOINERS)
    remaining = shown.remaining
    if remaining is not None and remaining < _MINUTE:
        return None
    limit = shown.time_limit  # Slurm's own word for no limit, which the partition allows
    if limits := [time for time in (remaining, time_of_joiners(given)) if time is not None]:
        limit = str(-(-min(limits) // _MINUTE))  # rounded up: Slurm must not warn the joiner before its parent
    if directives.given(script, "gpus"):
        raise UsageError("--gpus counts the GPUs of all nodes, a joiner has one node; use --gpus-per-node=N")
    options = [f"--job-name={_NAME.format(parent=parent)}", "--nodes=1", "--no-requeue"]
    options += [f"--output={log}", f"--time={limit}", "--export=ALL"]
    own = directives.given(script, "exclude") or ""
    if "/" in own:  # the name of a file
        own = shown.excluded
    if excluded := ",".join([*filter(None, [own]), *sorted(exclude)]):
        options.append(f"--exclude={excluded}")
    of_parent = {
        "partition": ",".join(shown.partitions), "account": shown.account, "qos": shown.qos, "chdir": shown.folder
    }  # fmt: skip
    options += [f"--{name}={value}" for name, value in of_parent.items() if value]
    options += [str(option) for option in given if option.name != "time"]
    return submit_script(directives.joiner_script(script), options, environ, exports={JOIN: str(run_dir)})


def change_time_limit(job: str, limit: timedelta) -> None:
    """Set the time limit of ``job``, in whole minutes; a user can only shorten it. Raises SlurmError."""
    client.scontrol("update", f"JobId={job}", f"TimeLimit={max(limit // _MINUTE, 1)}")
