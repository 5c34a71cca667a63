"""Jobs of the executors ``elastic`` and ``elastic-local``: submitit's job interface on top of ``handle.Job``."""

from __future__ import annotations

import atexit
import contextlib
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core import core, logger, utils

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError
from elastic_hpc.job import functions
from elastic_hpc.job.handle import Job, JobStatus
from elastic_hpc.record.folders import is_there
from elastic_hpc.submitit.environment import ElasticPaths


class States(core.InfoWatcher):
    """What Slurm says about all unfinished jobs, with one query for all. Works without Slurm's accounting."""

    def update(self) -> None:
        jobs = sorted(self._registered - self._finished)
        try:
            queue = slurm.queue(*jobs)
        except ElasticError as error:  # unknown does not mean ended
            logger.get_logger().warning("%s; the jobs' states may be out of date", error)
        else:
            self._info_dict |= {job: {"State": queue[job].state if job in queue else "GONE"} for job in jobs}
            self._finished |= {job for job in jobs if self.is_done(job, mode="cache")}
        self._num_calls += 1
        self._last_status_check = time.time()

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.get_info(job_id, mode).get("State", "UNKNOWN")


class ElasticJob(core.Job[core.R]):
    """A function that runs, or ran, on every rank of an elastic world. The number of ranks may change until the end."""

    watcher = States(delay_s=60)

    def __init__(self, folder: Path | str, job_id: str, tasks: Sequence[int] | None = None) -> None:
        """``tasks``: the number of one rank; None for all ranks."""
        self._folder, self._rank = folder, tasks[0] if tasks else None
        run_dir = functions.runs_folder(folder) / job_id
        self._job = Job(run_dir)
        super().__init__(folder, job_id, tasks or (0,))
        self._elastic_paths = ElasticPaths(folder, job_id, self._rank or 0, run_dir, 0)

    @property
    def status(self) -> JobStatus:
        """Round, nodes, restarts and so on; see ``elastic_hpc.JobStatus``."""
        return self._job.status()

    @property
    def paths(self) -> ElasticPaths:
        """The paths of this rank, with the result of the last round so far."""
        self._elastic_paths.round = self._job.last_round().get("round", 0)
        return self._elastic_paths

    @property
    def num_tasks(self) -> int:
        """Number of ranks of the last world so far."""
        return self._job.last_round().get("world_size", 1) if self._rank is None else 1

    def task(self, task_id: int) -> ElasticJob[core.R]:
        if not 0 <= task_id < self.num_tasks:
            raise ValueError(f"task_id {task_id}: expected a rank of the last world, 0 to {self.num_tasks - 1}")
        return self if self._rank is not None else type(self)(self._folder, self.job_id, (task_id,))

    def done(self, force_check: bool = False) -> bool:
        return self._state("force" if force_check else "standard")[1]

    @property
    def state(self) -> str:
        return self._state("standard")[0]

    def _state(self, mode: str) -> tuple[str, bool]:
        """The state, and whether it is final. The watcher asks Slurm, for all jobs at once."""
        if final := self._job.final_state():
            return final, True
        state = self.watcher.get_state(self._job.slurm_id, mode)
        if state != "UNKNOWN" and self.watcher.is_done(self._job.slurm_id, "cache"):
            status = self._job.status()  # another job may continue in its place
            return status.state, status.done
        return state, False

    def get_info(self, mode: str = "force") -> dict[str, str]:
        """The fields of submitit's own Slurm jobs; the nodes are those of the world."""
        state, _ = self._state(mode)
        nodes = ",".join(self._job.last_round().get("nodes", ()))
        return {"JobID": self.job_id, "State": state, "NodeList": nodes}

    def results(self) -> list[Any]:
        """What each rank of the last world has returned, in rank order."""
        ranks = range(self._ended().world_size) if self._rank is None else [self._rank]
        return [self._result_of(rank) for rank in ranks]

    def result(self) -> Any:
        """What the function returned on rank 0, or on this rank."""
        self._ended()
        return self._result_of(self._rank or 0)

    def exception(self) -> utils.UncompletedJobError | utils.FailedJobError | None:
        """Why the job has not finished, with the traceback of the rank that failed first, if a rank failed."""
        self.wait()
        status = self.status
        if status.state == "COMPLETED":
            return None
        trace = self._trace(status)
        where = f"the job's record is {self._job.run_dir}"
        if trace and status.state == "FAILED":
            return utils.FailedJobError(f"Job {self.job_id} failed: {status.reason}\n{trace}\n{where}")
        output = "" if self._job.final_state() else self.stderr()  # without a verdict, the output may say why
        reason = "\n".join(filter(None, (status.reason, output)))
        return utils.UncompletedJobError(
            f"Job {self.job_id} has not finished (state {status.state}): {reason}\n{where}"
        )

    def _trace(self, status: JobStatus) -> str:
        if status.failure:
            return f"rank {status.failure['rank']} on {status.failure['node']}: {status.failure['traceback']}"
        for path in sorted(functions.results_folder(self._job.run_dir, status.round).glob("*.pkl")):
            outcome, value = utils.pickle_load(path)
            if outcome == "error":
                return f"rank {path.stem}: {value}"
        return ""

    def _ended(self) -> JobStatus:
        if error := self.exception():
            raise error
        return self.status

    def _result_of(self, rank: int) -> Any:
        path = functions.results_folder(self._job.run_dir, self._job.last_round()["round"]) / f"{rank}.pkl"
        end = time.monotonic() + self._results_timeout_s  # a shared file system may be slow
        while not is_there(path):
            if time.monotonic() > end:
                raise utils.UncompletedJobError(
                    f"Job {self.job_id} (task: {rank}) has not produced any output (state: {self.state}): there is no "
                    f"{path}, as if the function had ended its process; see job.stderr()"
                )
            time.sleep(0.2)
        return functions.result(path)

    def _get_logs_string(self, name: str) -> str | None:
        """The output of this rank in all rounds, or of all ranks one after the other; before the first round, the
        output of the batch script.
        """
        if self._job.last_round():
            ranks = range(self.num_tasks) if self._rank is None else [self._rank]
            written = ("".join(self._job.logs(rank, "out" if name == "stdout" else "err")) for rank in ranks)
            return "\n".join(filter(None, written))
        with contextlib.suppress(OSError):
            return self._job.run_dir.with_name(f"{self.job_id}.log").read_text(errors="replace")
        return None

    def cancel(self, check: bool = True) -> None:
        try:
            self._job.cancel()
        except ElasticError:
            if check:
                raise

    def cancel_at_deletion(self, value: bool = True) -> ElasticJob[core.R]:
        """Like submitit's method. The end of the program deletes the job too, before the interpreter shuts down."""
        if value:
            atexit.register(_delete, weakref.ref(self))
        self._cancel_at_deletion = value
        return self

    def __del__(self) -> None:
        if self._cancel_at_deletion:
            self._cancel_at_deletion = False
            if not self._state("cache")[1]:
                self.cancel(check=False)

    def _interrupt(self, timeout: bool = False) -> None:
        """For tests: act as Slurm before the time limit, or at a preemption. Raises ElasticError if nothing runs."""
        status = self._job.status()
        if timeout and not status.done and status.state not in slurm.WAITS:
            slurm.warn(self._job.slurm_id)
        else:
            self._job.drain("preempted")


def _delete(job: weakref.ref[ElasticJob[Any]]) -> None:
    if (alive := job()) is not None:
        alive.__del__()


class ElasticLocalJob(ElasticJob[core.R]):
    """A function on this machine."""

    def _state(self, _mode: str) -> tuple[str, bool]:
        status = self._job.status()
        return status.state, status.done

    def _register_in_watcher(self) -> None:
        """Does nothing: Slurm does not know the job."""

    def _interrupt(self, timeout: bool = False) -> None:
        self._job.drain("time limit" if timeout else "preempted")
