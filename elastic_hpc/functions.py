"""A Python function in the place of a training script. submitit pickles it and runs it on every rank; what the ranks
return, or raise, is kept for each round, so that what a lost world left is never taken for the result.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from submitit.core import job_environment, utils

from elastic_hpc import training
from elastic_hpc.ask import ask_leader
from elastic_hpc.errors import ElasticError
from elastic_hpc.rundir import RunDir

MODULE = "submitit.core._submit"
"""What submitit's own executors run, with the folder of the pickle as its argument."""

CLUSTERS = ("elastic", "elastic-local")

_LOOK = 0.2
_LEAVE = 5.0
"""Seconds that rank 0, which has saved, waits for the other ranks to leave."""


def write(function: Callable[..., Any], args: Sequence[Any], folder: Path, run_dir: Path) -> None:
    """Where the workers of the job in ``run_dir`` look for what they are to call, when ``folder`` is their argument."""
    utils.DelayedSubmission(function, *args).dump(utils.JobPaths(folder, run_dir.name).submitted_pickle)


def environ() -> dict[str, str]:
    """This process's environment, for agents whose workers run a function."""
    return {**os.environ, "SUBMITIT_EXECUTOR": CLUSTERS[0]}


def results_folder(run_dir: Path, round: int) -> Path:
    return run_dir / "results" / str(round)


class ElasticPaths(utils.JobPaths):
    """submitit's paths; the result is that of a round, the rest that job has in ``run_dir``."""

    def __init__(self, folder: Path | str, job_id: str, task_id: int, run_dir: Path, round: int) -> None:
        super().__init__(folder, job_id, task_id)
        self.run_dir, self.round = run_dir, round

    @property
    def result_pickle(self) -> Path:
        return results_folder(self.run_dir, self.round) / f"{self.task_id}.pkl"

    @property
    def stdout(self) -> Path:
        return self._log("out")

    @property
    def stderr(self) -> Path:
        return self._log("err")

    def _log(self, stream: str) -> Path:
        """What the rank wrote last; before it was started, the output of the batch script and the agents."""
        written = RunDir(self.run_dir).logs(self.task_id, stream)
        return written[-1] if written else self.run_dir.with_name(f"{self.run_dir.name}.log")


class ElasticJobEnvironment(job_environment.JobEnvironment):
    """Where a function runs: ranks and sizes are those of the world that trains, which changes from round to round."""

    _env: ClassVar[dict[str, str]] = {
        "num_tasks": "WORLD_SIZE",
        "num_nodes": "GROUP_WORLD_SIZE",
        "node": "GROUP_RANK",
        "global_rank": "RANK",
        "local_rank": "LOCAL_RANK",
    }

    def activated(self) -> bool:
        return os.environ.get("SUBMITIT_EXECUTOR") in CLUSTERS

    @property
    def run_dir(self) -> Path:
        return Path(os.environ["ELASTIC_HPC_RUN_DIR"])

    @property
    def raw_job_id(self) -> str:
        return os.environ.get("SLURM_JOB_ID", self.job_id)

    @property
    def job_id(self) -> str:
        """What the job was submitted as, also where another goes on in its place, and on a joiner."""
        return self.run_dir.name

    @property
    def array_job_id(self) -> str | None:
        array, _, task = self.job_id.partition("_")
        return array if task else None

    @property
    def array_task_id(self) -> str | None:
        return self.job_id.partition("_")[2] or None

    @property
    def hostnames(self) -> list[str]:
        """The nodes of this world, in rank order; this one alone where the record does not have them yet."""
        events, round = RunDir(self.run_dir).events(), int(os.environ["ELASTIC_HPC_ROUND"])
        formed = (e["nodes"] for e in events if e["event"] == "round" and e["round"] == round)
        return next(formed, [self.hostname])

    @property
    def paths(self) -> ElasticPaths:
        round = int(os.environ["ELASTIC_HPC_ROUND"])
        results_folder(self.run_dir, round).mkdir(mode=0o700, parents=True, exist_ok=True)
        return ElasticPaths(os.environ["SUBMITIT_FOLDER"], self.job_id, self.global_rank, self.run_dir, round)

    def _handle_signals(self, paths: utils.JobPaths, submission: utils.DelayedSubmission) -> None:
        """A function that can checkpoint is asked to when the agent wants its workers to save and stop. One that calls
        ``drain_requested`` hears that itself, and one that does neither is stopped.
        """
        if hasattr(submission.function, "checkpoint") or hasattr(submission.function, "__submitit_checkpoint__"):
            assert isinstance(paths, ElasticPaths)
            DrainHandler(self, paths, submission).start()


class DrainHandler(job_environment.SignalHandler):
    """submitit's handler, set off by the agent: rank 0 checkpoints, then all ranks leave. The agents requeue."""

    def __init__(self, env: ElasticJobEnvironment, paths: ElasticPaths, delayed: utils.DelayedSubmission) -> None:
        super().__init__(env, paths, delayed)
        self._rundir = RunDir(paths.run_dir)
        self._paths = paths
        self._rank, self._size = env.global_rank, env.num_tasks
        self._pid = os.getpid()
        self._saved = paths.result_pickle.with_name("saved")

    def start(self) -> None:
        training.listen()
        if self._rank == 0:
            signal.signal(signal.SIGUSR2, self.checkpoint_and_try_requeue)
            signal.signal(signal.SIGTERM, self.checkpoint_and_try_requeue)  # a preemption without a warning
        else:
            signal.signal(signal.SIGTERM, self.bypass)
        threading.Thread(target=self._watch, name="drain", daemon=True).start()

    def _watch(self) -> None:
        while not training.is_told_to_drain():
            if self._saved.exists():
                break
            time.sleep(_LOOK)
        if self._rank == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
            return
        while not self._saved.exists():
            time.sleep(_LOOK)
        training.mark_drained()
        self._left(self._rank).touch()
        os._exit(0)  # the main thread may be in a collective that rank 0 has left

    def _left(self, rank: int) -> Path:
        return self._saved.with_name(f"left.{rank}")

    def has_timed_out(self) -> bool:
        """The time limit came, which the agents know; a preemption, the user, or a change of the world did not."""
        asked = [e["reason"] for e in self._rundir.events() if e["event"] in {"request", "drain"}]
        return asked[-1:] == ["time limit"]

    def checkpoint_and_try_requeue(self, signum: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self._pid:  # a data loader has inherited this handler
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
            return
        for name in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(name, self.bypass)  # once is enough
        try:
            super().checkpoint_and_try_requeue(signum, frame)
        except utils.UncompletedJobError as error:
            utils.cloudpickle_dump(("error", str(error)), self._paths.result_pickle)
            with contextlib.suppress(ElasticError):
                ask_leader(self._rundir, "stop", str(error))
            raise

    def _exit(self) -> None:
        training.mark_drained()
        self._saved.touch()
        end = time.monotonic() + _LEAVE
        while time.monotonic() < end and not all(self._left(rank).exists() for rank in range(1, self._size)):
            time.sleep(_LOOK)
        os._exit(0)


def result(run_dir: Path, round: int, rank: int) -> Any:
    """What ``rank`` has returned in ``round``. Raises ElasticError if it has left nothing, or an error."""
    path = results_folder(run_dir, round) / f"{rank}.pkl"
    try:
        outcome, value = utils.pickle_load(path)
    except OSError as error:
        raise ElasticError(f"rank {rank} has left no result: {path}: {error.strerror}") from None
    if outcome != "success":
        raise ElasticError(f"rank {rank} has failed:\n{value}")
    return value
