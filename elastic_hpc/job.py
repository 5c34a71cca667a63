"""A job from Python: submit it, see how it is, wait for it, read its logs, stop it. Works from the run directory, and
asks Slurm only for what that cannot say, so that a job can be looked at when Slurm has forgotten it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError, UsageError
from elastic_hpc.registry import remember
from elastic_hpc.request import prepared
from elastic_hpc.rundir import RunDir
from elastic_hpc.script import JobSpec

_ASK_SLURM = 2.0, 30.0  # seconds between two questions, at first and after a while
_LOOK = 0.5


@dataclass(frozen=True)
class JobStatus:
    """A job at one moment."""

    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...; UNKNOWN if neither the run directory nor Slurm
    knows."""
    done: bool
    """Whether it will not run again."""
    round: int
    """Of the world that trains or trained last; 0 before the first."""
    nodes: tuple[str, ...]
    """Of that world, in rank order."""
    world_size: int
    restarts: int
    requeues: int
    reason: str
    """Why the last run ended, in a sentence; empty while the first one runs."""
    failure: Mapping[str, Any] | None
    """The first failure of a job that failed: ``kind``, ``node``, ``rank``, ``exit_code``, ``message``, ``traceback``
    and so on."""


class Job:
    """A submitted job, an array's task among them. Cheap to make; nothing is asked before a method is called.

    ``run_dir`` is its memory, for its owner only: docs/how-it-works.md says what is in there.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, is_array: bool = False) -> None:
        """A job that exists, by its run directory: ``Job("elastic-logs/4711")``."""
        self.run_dir = Path(run_dir).absolute()
        self.id = self.run_dir.name
        """What ``sbatch`` said; of a task of an array ``ARRAY_TASK``."""
        self._is_array = is_array
        self._record = RunDir(self.run_dir)

    def __repr__(self) -> str:
        return f"Job({str(self.run_dir)!r})"

    def task(self, index: int) -> Job:
        """One task of a job array, which is an elastic job of its own."""
        return Job(self.run_dir.with_name(f"{self.id}_{index}"))

    def status(self) -> JobStatus:
        """How it is now. Raises SlurmError if Slurm is needed to tell, and cannot be asked."""
        return self._status(self.final_state() or self._ask())

    def wait(self, timeout: float | None = None) -> JobStatus:
        """Until it has ended for good: it finished, failed or was cancelled. Requeues are waited through.

        ``timeout``: seconds. Raises TimeoutError when they have passed; the job goes on. When Slurm cannot be asked for
        a while, that is waited through too.
        """
        begin = time.monotonic()
        asked, pause, state = float("-inf"), _ASK_SLURM[0], "UNKNOWN"
        while True:
            final, now = self.final_state(), time.monotonic()
            if final is None and now - asked > pause:
                with contextlib.suppress(SlurmError):
                    state = self._ask()
                asked, pause = now, min(_ASK_SLURM[1], max(_ASK_SLURM[0], (now - begin) / 4))
            if final or state not in {*slurm.LIVES, "UNKNOWN"}:
                return self._status(self.final_state() or state)
            if timeout is not None and now - begin > timeout:
                raise TimeoutError(f"job {self.id} has not ended in {timeout:g} s; it goes on")
            time.sleep(_LOOK)

    def logs(self, rank: int = 0, stream: Literal["out", "err"] = "out") -> Iterator[str]:
        """The lines that the worker of this rank has written, round after round."""
        for path in self._record.logs(rank, stream):
            with open(path, errors="replace") as file:
                yield from file

    def drain(self, reason: str = "user") -> None:
        """Have it save, stop, and come back through the queue. ``reason``: ``user``, or what is to be rehearsed,
        ``time limit`` or ``preempted``. Raises ElasticError if its leader cannot be reached.
        """
        self._tell("drain", reason)

    def stop(self, *, after_checkpoint: bool = False) -> bool:
        """End it for good, running or waiting. ``after_checkpoint``: the workers may save first, ``--grace`` long.

        True if it waited in the queue and is cancelled, False if its leader was told.
        """
        if not self.run_dir.is_dir() or self.status().state in slurm.WAITS:
            slurm.cancel(self.slurm_id)
            return True
        self._tell("save-and-stop" if after_checkpoint else "stop")
        return False

    def cancel(self) -> None:
        """``scancel``: end it at once, whatever state it is in. On one machine without Slurm its leader does so."""
        if self._record.is_held() is None:
            slurm.cancel(self.slurm_id)
        else:
            self._tell("stop")

    def _tell(self, request: Literal["drain", "save-and-stop", "stop"], reason: str = "user") -> None:
        from elastic_hpc.ask import ask_leader  # asyncio takes its time to be imported

        ask_leader(self._record, request, reason)

    def _asked_for(self) -> Mapping[str, Any] | None:
        return self._record.read("spec.json") if self.run_dir.is_dir() else None

    def _verdict(self) -> Mapping[str, Any] | None:
        if self._is_array:
            raise UsageError(f"job {self.id} is an array, each of its tasks is a job: job.task(0)")
        return self._record.read("verdict.json") if self.run_dir.is_dir() else None

    @property
    def slurm_id(self) -> str:
        """Its id, or that of the job that goes on in its place where a job may not be requeued."""
        verdict = self._verdict()
        if verdict and (job := self._record.goes_on_as(verdict["run"])):
            return job
        return str((self._asked_for() or {}).get("job", self.id))

    def final_state(self) -> str | None:
        """Slurm's word for how it has ended, if the run directory says that it has."""
        verdict = self._verdict()
        if verdict is None or verdict["outcome"] == "requeue":
            return None
        failed = "CANCELLED" if verdict["cause"] == "user" else "FAILED"
        return "COMPLETED" if verdict["outcome"] == "finished" else failed

    def last_round(self) -> Mapping[str, Any]:
        """The event of the last world that was formed, ``round``, ``nodes``, ``world_size``; empty before the first."""
        return self._record.last_round()

    def _ask(self) -> str:
        """From its launcher, or Slurm: Slurm's word for its state, GONE if Slurm does not know it."""
        held = self._record.is_held()
        if held is not None:
            return "RUNNING" if held else self.final_state() or "FAILED"
        job = self.slurm_id
        state = slurm.states(job).get(job, "GONE")
        if state not in slurm.LIVES and self.slurm_id != job:  # meanwhile another went on in its place
            return self._ask()
        return state

    def _status(self, state: str) -> JobStatus:
        verdict, formed = self._verdict(), self.last_round()
        counters = (self._record.read("state.json") if formed else None) or {}
        return JobStatus(
            state=state if state != "GONE" else "UNKNOWN",
            done=state not in slurm.LIVES,
            round=formed.get("round", 0),
            nodes=tuple(formed.get("nodes", ())),
            world_size=formed.get("world_size", 0),
            restarts=counters.get("restarts", 0),
            requeues=counters.get("requeues", 0),
            reason=verdict["reason"] if verdict else "",
            failure=verdict["failure"] if verdict and verdict["outcome"] == "failed" else None,
        )


def submit(spec: JobSpec, on_message: Callable[[str], None] = lambda _: None) -> Job:
    """Submit ``spec``. ``on_message`` gets what sbatch says besides the job's id, and what was not taken of the
    environment.

    Raises UsageError if the job is refused, by us or by Slurm, and SlurmError if Slurm cannot be asked.
    """
    submitted: list[str] = []
    for note in spec.notes:
        on_message(f"{note}\n")
    with prepared(spec) as script:
        slurm.sbatch(script, [], os.environ, submitted.append, on_message)
    if not submitted:
        raise ElasticError("sbatch: no job id")
    number = submitted[0].partition(";")[0]
    remember(os.path.join(spec.log_dir, number))
    return Job(os.path.join(spec.log_dir, number), is_array=spec.has("array"))
