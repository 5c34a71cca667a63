"""The executors ``elastic`` and ``elastic-local`` of submitit: functions as elastic jobs.

An entry point in the group ``submitit``. submitit imports this module in every program that uses submitit, so the
module imports what a job needs only when there is a job.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.auto import auto
from submitit.core import core, plugins, utils

from elastic_hpc.errors import ElasticError
from elastic_hpc.job.functions import CLUSTERS, MODULE, runs_folder

if TYPE_CHECKING:
    from elastic_hpc.job.spec import JobSpec


class ElasticExecutor(core.Executor):
    """Submits functions to Slurm as elastic jobs. Parameters: for example ``nodes="4:8"``, ``gpus_per_node=8`` and
    ``timeout_min=60``, and every other option of elastic-sbatch and of sbatch by its name.

    Raises UsageError for parameters that an elastic job cannot have; otherwise the same errors as submitit's executors.
    """

    def __init__(
        self, folder: Path | str, max_num_timeout: int = 3, max_pickle_size_gb: float = 1.0, python: str | None = None
    ) -> None:
        """``max_num_timeout``: how often a function that can checkpoint continues after its time limit. ``python``: the
        Python interpreter of the agents and the workers, as for elastic-sbatch.
        """
        super().__init__(folder)
        self.max_num_timeout = max_num_timeout
        self.max_pickle_size_gb = max_pickle_size_gb
        self.python = python

    @classmethod
    def name(cls) -> str:
        """``elastic``. submitit calls this for each executor in its list of loaded executors. By an entry point a
        package can add only one executor to the list, so this call adds ``elastic-local``.
        """
        loaded = plugins._get_plugins()[0]
        if ElasticExecutor in loaded and ElasticLocalExecutor not in loaded:
            loaded.append(ElasticLocalExecutor)
        return CLUSTERS[0]

    @classmethod
    def affinity(cls) -> int:
        """0 if sbatch exists, else -1: submitit chooses this executor only if the user names it."""
        return -1 if shutil.which("sbatch") is None else 0

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        """Empty, because AutoExecutor looks up names without a prefix in all executors, for any cluster."""
        return set()

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        from elastic_hpc.submitit.parameters import renamed

        changed = {**self.parameters, **renamed(kwargs)}
        self._spec(changed)
        self.parameters.update(changed)

    @property
    def _runs(self) -> Path:
        return runs_folder(self.folder)

    def _spec(self, parameters: Mapping[str, Any], count: int = 1) -> JobSpec:
        """The job for ``count`` functions. Raises UsageError for parameters that a job cannot have."""
        from elastic_hpc.job.spec import JobSpec
        from elastic_hpc.submitit.parameters import options_of

        options = {"nodes": "1", "job_name": "submitit", "python": self.python, **options_of(parameters)}
        parallel = options.pop("array_parallelism", None)
        if count > 1:
            options["array"] = f"0-{count - 1}" + (f"%{parallel}" if parallel else "")
        output = "%A_%a.log" if count > 1 else "%j.log"
        return JobSpec.of(
            MODULE,
            str(self.folder),
            module=True,
            setup=options.pop("setup", None) or (),
            env={**(options.pop("env", None) or {}), "SUBMITIT_EXECUTOR": CLUSTERS[0]},
            sbatch=options.pop("sbatch", None),
            **{"output": self._runs / output, **options, "log_dir": self._runs},
        )

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        from elastic_hpc.job.handle import submit
        from elastic_hpc.job.script import render
        from elastic_hpc.submitit.jobs import ElasticJob

        spec = self._spec(self.parameters, len(delayed_submissions))
        pickles = self._dump(delayed_submissions)
        try:
            job = submit(spec)
        except BaseException as error:
            for path in pickles:
                path.unlink()
            if isinstance(error, ElasticError):
                raise utils.FailedJobError(str(error)) from error
            raise
        ids = [job.id] if len(pickles) == 1 else [f"{job.id}_{task}" for task in range(len(pickles))]
        jobs: list[core.Job[Any]] = [ElasticJob(self.folder, id) for id in ids]
        for submitted, path in zip(jobs, pickles, strict=True):
            submitted.paths.move_temporary_file(path, "submitted_pickle")
        jobs[0].paths.submission_file.write_text(render(spec))
        return jobs

    def _dump(self, delayed_submissions: Sequence[utils.DelayedSubmission]) -> list[Path]:
        """The pickles, under temporary names until the jobs have ids."""
        from elastic_hpc.record.folders import make_log_dir

        make_log_dir(self._runs)
        paths = []
        for delayed in delayed_submissions:
            delayed.set_timeout(0, self.max_num_timeout)
            paths.append(self._runs.with_name(f"{uuid.uuid4().hex}.pkl"))
            delayed.dump(paths[-1])
            size = len(delayed_submissions) * paths[-1].stat().st_size / 1024**3
            if size > self.max_pickle_size_gb:
                for path in paths:
                    path.unlink()
                raise RuntimeError(
                    f"the pickled functions take about {size:.2f} GB, more than max_pickle_size_gb="
                    f"{self.max_pickle_size_gb:g}; load large data in the function, or raise it"
                )
        return paths


class ElasticLocalExecutor(ElasticExecutor):
    """Runs functions on this machine, without Slurm, with one agent for each node that the job may use. Ignores options
    that describe the job to Slurm.
    """

    @classmethod
    def name(cls) -> str:
        return CLUSTERS[1]

    @classmethod
    def affinity(cls) -> int:
        return 0

    def _internal_process_submissions(
        self, delayed_submissions: Sequence[utils.DelayedSubmission]
    ) -> list[core.Job[Any]]:
        spec = self._spec(self.parameters)
        jobs: list[core.Job[Any]] = []
        for path in self._dump(delayed_submissions):
            job = self._start(spec)
            job.paths.move_temporary_file(path, "submitted_pickle")
            jobs.append(job)
        return jobs

    def _start(self, spec: JobSpec) -> core.Job[Any]:
        from elastic_hpc.options.table import WITHOUT_SLURM
        from elastic_hpc.record.rundir import RunDir
        from elastic_hpc.start import module_command
        from elastic_hpc.submitit.jobs import ElasticLocalJob

        rundir = RunDir.new(self._runs, "local")
        launch, known = spec.launch, {option.flag for option in WITHOUT_SLURM}
        count = launch.most_nodes
        options = [f"{flag}={value}" for flag, value in launch.options() if flag in known]
        options = [f"--local={count}", f"--run-dir={rundir.path}", *options, "--module"]
        srun = module_command(sys.executable, "elastic_hpc.cli.srun", *options)
        command = [*srun, launch.script, *launch.script_args]
        environ = {**os.environ, **{name: setting.value for name, setting in spec.env.items()}}
        with rundir.hold() as lock, open(f"{rundir.path}.log", "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie
        return ElasticLocalJob(self.folder, rundir.path.name)


_update_parameters = auto.AutoExecutor._internal_update_parameters
_init = auto.flexible_init


def _update_parameters_of_ours(executor: auto.AutoExecutor, **kwargs: Any) -> None:
    ours = isinstance(executor._executor, ElasticExecutor)
    if ours or any(name.startswith("elastic_") for name in kwargs):
        from elastic_hpc.submitit import parameters as submitit_parameters

        if ours:
            kwargs = submitit_parameters.of_auto(executor, kwargs, _update_parameters)
            executor._executor._internal_update_parameters(**kwargs)
            return
        kwargs = submitit_parameters.split(kwargs)[1]
    _update_parameters(executor, **kwargs)


def _init_ours(cls: type[core.Executor], folder: Path | str, **kwargs: Any) -> core.Executor:
    if not issubclass(cls, ElasticExecutor):
        return _init(cls, folder, **kwargs)
    given: dict[str, Any] = {}
    for prefix in ("slurm_", "elastic_"):
        given |= {name.removeprefix(prefix): value for name, value in kwargs.items() if name.startswith(prefix)}
    return cls(folder, **given)


# AutoExecutor requires nodes to be an int, and drops slurm_* parameters when the cluster has another name. Other
# clusters stay as they are. A test in tests/unit/test_submitit.py fails when submitit changes.
auto.AutoExecutor._internal_update_parameters = _update_parameters_of_ours  # type: ignore[assignment,method-assign]
auto.flexible_init = _init_ours
