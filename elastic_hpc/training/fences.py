"""Who may save in a folder of checkpoints: owners, the fences that name them, and whether another owner is alive."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from elastic_hpc.environment import FENCE, RUN_DIR, is_of_another_job
from elastic_hpc.errors import ElasticError
from elastic_hpc.record.rundir import RunDir

log = logging.getLogger(__name__)

_PROCESS = os.urandom(8).hex()
_POLL = 0.2


class FencedOut(ElasticError):
    """This worker may not save in the folder, which belongs to a later round of its job, or to another job."""


class Owner(NamedTuple):
    """One round of one run of a job; or a process without an agent, which is a job of its own."""

    job: str
    """``RunDir.identity``: other jobs may have the same ``--rdzv-id``, and the same Slurm job may run two trainings."""
    run: int
    """How often Slurm has started the job before. A run starts with a round of any number, as the record of the run
    before may be lost.
    """
    round: int

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Owner:
        """Raises ValueError."""
        job, run, round = text.rsplit(".", 2)
        return cls(job, int(run), int(round))

    def precedes(self, other: Owner) -> bool:
        """Whether this is an earlier round of the same job, by number alone: no file and no clock is asked."""
        return self.job == other.job and self[1:] < other[1:]


def own(environ: Mapping[str, str]) -> tuple[Owner, str]:
    """The owner that this process is, and the run directory of its job; empty without an agent."""
    if environ.get(FENCE) and not is_of_another_job(environ):
        return Owner.parse(environ[FENCE]), os.path.abspath(environ.get(RUN_DIR, ""))
    return Owner(f"process-{_PROCESS}-{os.getpid()}", 0, 0), ""


def living(owners: Mapping[Owner, str]) -> str | None:
    """The run directory of a job that is alive, of several ``owners`` with their run directories; None if all jobs have
    ended.

    A job is alive while a leader is at work, which sets the time of a file in the run directory every second. Whether
    that time changes is looked at until it has stood still for three heartbeat timeouts: no two clocks are compared,
    and Slurm is not asked. A job with a verdict has ended, and so has a job whose run directory cannot be read.
    """
    watched = {path: RunDir(path) for owner, path in owners.items() if path and _is_of(RunDir(path), owner)}
    beats = {path: rundir.heartbeat() for path, rundir in watched.items()}
    began, told = time.monotonic(), False
    while watched := {path: rundir for path, rundir in watched.items() if not _has_ended(rundir)}:
        waited = time.monotonic() - began
        for path, rundir in list(watched.items()):
            if rundir.heartbeat() not in {0, beats[path]}:
                return path
            if waited > _patience(rundir):
                del watched[path]
        if waited > 2 and not told and watched:
            told = True
            log.warning("watching whether the job in %s, which used this folder last, is alive", next(iter(watched)))
        time.sleep(_POLL)
    return None


def run_dirs(fences: Mapping[Owner, Path]) -> dict[Owner, str]:
    """What is written in ``fences``: the run directory of each owner's job, empty without an agent."""
    found = {}
    for owner, path in fences.items():
        with contextlib.suppress(OSError):
            found[owner] = os.fsdecode(path.read_bytes())
    return found


def names(paths: Collection[str]) -> str:
    """The jobs with the run directories ``paths``, as the user knows them."""
    return ", ".join(f"job {os.path.basename(path)}" if path else "a process without an agent" for path in paths)


def _is_of(rundir: RunDir, owner: Owner) -> bool:
    """Whether ``rundir`` is still that of the owner's job: another job may have made its own in the same place."""
    try:
        return rundir.identity() == owner.job
    except ElasticError:
        return False


def _has_ended(rundir: RunDir) -> bool:
    try:
        verdict, leader = rundir.read("verdict.json"), rundir.read("endpoint.json")
        return bool(verdict and leader and verdict["run"] >= leader["run"])
    except (ElasticError, OSError, KeyError, TypeError):
        return False


def _patience(rundir: RunDir) -> float:
    """Seconds after which a job without a sign of a leader has ended: the next leader takes over earlier."""
    with contextlib.suppress(ElasticError, OSError, ValueError):
        return 3 * float((rundir.read("spec.json") or {}).get("--heartbeat-timeout", 5))
    return 15.0
