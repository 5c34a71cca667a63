"""Who may save in a folder of checkpoints: the fences that name owners, and whether another owner is alive."""

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
    """This worker may not save in the folder: a later round of its job, or another job, owns the folder."""


class Owner(NamedTuple):
    """One round of one run of a job; or a process without an agent, which is a job of its own."""

    job: str
    """``RunDir.identity``. Neither ``--rdzv-id`` nor the id of the Slurm job is unique to one training."""
    run: int
    """How often Slurm has started the job before. The first round of a run may have any number, because the record of
    the run before may be lost.
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
        """Whether this is an earlier round of the same job. The numbers decide, without a file or a clock."""
        return self.job == other.job and self[1:] < other[1:]


def own(environ: Mapping[str, str]) -> tuple[Owner, str]:
    """This process as an owner, and the run directory of its job, which is empty without an agent."""
    if environ.get(FENCE) and not is_of_another_job(environ):
        return Owner.parse(environ[FENCE]), os.path.abspath(environ.get(RUN_DIR, ""))
    return Owner(f"process-{_PROCESS}-{os.getpid()}", 0, 0), ""


def living(owners: Mapping[Owner, str]) -> str | None:
    """Watch the run directories of the jobs of ``owners``. Returns the run directory of the first job that is alive;
    None if all jobs have ended.

    The leader of a job that is alive sends a heartbeat every second (``RunDir.beat``). A job without a heartbeat for
    three heartbeat timeouts, by the clock of this process, counts as ended. So does a job with a verdict, and a job
    whose run directory cannot be read.
    """
    watched = {path: RunDir(path) for owner, path in owners.items() if path and _is_of(RunDir(path), owner)}
    beats = {path: rundir.heartbeat() for path, rundir in watched.items()}
    began, logged = time.monotonic(), False
    while watched := {path: rundir for path, rundir in watched.items() if not _has_ended(rundir)}:
        waited = time.monotonic() - began
        for path, rundir in list(watched.items()):
            if rundir.heartbeat() not in {0, beats[path]}:
                return path
            if waited > _patience(rundir):
                del watched[path]
        if waited > 2 and not logged and watched:
            logged = True
            log.warning("watching whether the job in %s, which used this folder last, is alive", next(iter(watched)))
        time.sleep(_POLL)
    return None


def run_dirs(fences: Mapping[Owner, Path]) -> dict[Owner, str]:
    """The content of ``fences``: the run directory of each owner's job, empty for an owner without an agent."""
    found = {}
    for owner, path in fences.items():
        with contextlib.suppress(OSError):
            found[owner] = os.fsdecode(path.read_bytes())
    return found


def names(paths: Collection[str]) -> str:
    """Names for users of the jobs with the run directories ``paths``."""
    return ", ".join(f"job {os.path.basename(path)}" if path else "a process without an agent" for path in paths)


def _is_of(rundir: RunDir, owner: Owner) -> bool:
    """Whether ``rundir`` still belongs to the owner's job; another job may have replaced it at the same path."""
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
    """Seconds without a heartbeat after which a job counts as ended. A next leader would take over sooner."""
    with contextlib.suppress(ElasticError, OSError, ValueError):
        return 3 * float((rundir.read("spec.json") or {}).get("--heartbeat-timeout", 5))
    return 15.0
