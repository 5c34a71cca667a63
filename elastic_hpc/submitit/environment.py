"""What submitit needs to know in a worker that runs a function: its rank and world, and the paths of its rank."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import ClassVar

from submitit.core import job_environment, utils

from elastic_hpc.environment import LOCAL_NODES
from elastic_hpc.errors import ElasticError
from elastic_hpc.job.functions import CLUSTERS, results_folder
from elastic_hpc.record.events import EventReader

_RECORD_WITHIN = 30.0
"""Seconds within which a shared file system should show what the leader has written."""


class ElasticPaths(utils.JobPaths):
    """submitit's paths of a rank: the result of ``round``, and the logs of the job in ``run_dir``."""

    def __init__(self, folder: Path | str, job_id: str, task_id: int, run_dir: Path, round: int) -> None:
        super().__init__(folder, job_id, task_id)
        self.run_dir, self.round = run_dir, round

    @property
    def result_pickle(self) -> Path:
        return results_folder(self.run_dir, self.round) / f"{self.task_id}.pkl"

    @property
    def stdout(self) -> Path:
        """The last file with the output of all ranks on the rank's node; before the rank has written, the file with the
        output of the batch script and the agents.
        """
        from elastic_hpc.record.worker_logs import files

        written = files(self.run_dir / "logs", self.task_id)
        return written[-1] if written else self.run_dir.with_name(f"{self.run_dir.name}.log")

    stderr = stdout


class ElasticJobEnvironment(job_environment.JobEnvironment):
    """The world in which a function runs; ranks and sizes change from round to round."""

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
        """The id of the job as submitted, also on a joiner, and if another Slurm job continues in its place."""
        return self.run_dir.name

    @property
    def array_job_id(self) -> str | None:
        array, _, task = self.job_id.partition("_")
        return array if task else None

    @property
    def array_task_id(self) -> str | None:
        return self.job_id.partition("_")[2] or None

    @property
    def round(self) -> int:
        return int(os.environ["ELASTIC_HPC_ROUND"])

    @property
    def hostname(self) -> str:
        return "localhost" if self._is_local else super().hostname

    @property
    def hostnames(self) -> list[str]:
        """The nodes of this world, in rank order. Raises ElasticError if the record does not contain them."""
        if self._is_local:
            return ["localhost"] * self.num_nodes
        reader, end = EventReader(self.run_dir), time.monotonic() + _RECORD_WITHIN
        while True:
            reader.read()
            for event in reversed(reader.events):
                if event["event"] == "round" and event["round"] == self.round:
                    return list(event["nodes"])
            if time.monotonic() > end:
                raise ElasticError(f"{self.run_dir}: the record does not say which nodes round {self.round} has")
            time.sleep(0.1)

    @property
    def _is_local(self) -> bool:
        """Whether the nodes are processes of one machine, with names that cannot be resolved."""
        return LOCAL_NODES in os.environ

    @property
    def paths(self) -> ElasticPaths:
        results_folder(self.run_dir, self.round).mkdir(mode=0o700, parents=True, exist_ok=True)
        return ElasticPaths(os.environ["SUBMITIT_FOLDER"], self.job_id, self.global_rank, self.run_dir, self.round)

    def _requeue(self, countdown: int) -> None:
        """Does nothing: the agents requeue."""

    def _handle_signals(self, paths: utils.JobPaths, submission: utils.DelayedSubmission) -> None:
        """Called by submitit in the worker after it has loaded the function, and before it calls the function.

        When the agent wants its workers to save and stop, submitit calls the checkpoint method of a function that has
        one. A function that calls ``drain_requested`` saves itself, and any other function is stopped.
        """
        from elastic_hpc.submitit import worker

        worker.adapt()
        if hasattr(submission.function, "checkpoint") or hasattr(submission.function, "__submitit_checkpoint__"):
            worker.DrainHandler(self, paths, submission, self.run_dir).start()
