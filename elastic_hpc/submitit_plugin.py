"""The executors ``elastic`` and ``elastic-local`` of submitit: functions as elastic jobs.

Entry points in the group ``submitit``; imported by submitit when an executor is looked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit.auto.auto import AutoExecutor
from submitit.core import core, plugins, utils

from elastic_hpc import functions
from elastic_hpc.errors import UsageError
from elastic_hpc.job import submit
from elastic_hpc.request import from_names
from elastic_hpc.rundir import RunDir
from elastic_hpc.script import JobSpec, render
from elastic_hpc.spec import LAUNCH_OPTIONS
from elastic_hpc.start import module_command
from elastic_hpc.submitit_jobs import ElasticJob, ElasticLocalJob, runs_folder

_RENAMED = {
    "name": "job_name",
    "timeout_min": "time",
    "tasks_per_node": "nproc_per_node",
    "ntasks_per_node": "nproc_per_node",
    "signal_delay_s": "grace",
}
_REFUSED = {
    "stderr_to_stdout": "stdout and stderr of a rank are files of their own",
    "srun_args": "the srun line is the project's own; use a template",
    "teardown": "the batch script may be lost with its node; let the function clean up",
    "log_dir": "the run directories are in the executor's folder",
}


class ElasticExecutor(core.Executor):
    """Submits functions to Slurm as elastic jobs: ``nodes="4:8"``, ``gpus_per_node=8``, ``timeout_min=60``, and every
    other option of elastic-sbatch and of sbatch by its name.

    Raises ElasticError where submitit's own would fail in its own way: UsageError for parameters that cannot be.
    """

    job_class = ElasticJob

    def __init__(self, folder: Path | str, max_num_timeout: int = 3, max_pickle_size_gb: float = 1.0) -> None:
        """``max_num_timeout``: how often a function that can checkpoint goes on after its time limit."""
        super().__init__(folder)
        self.max_num_timeout = max_num_timeout
        self.max_pickle_size_gb = max_pickle_size_gb

    @classmethod
    def name(cls) -> str:
        """Called by submitit on each executor that it has loaded, in the order of its list, when it makes its table of
        them. A package may put one executor into that list by its entry points; ours puts the other behind it.
        """
        loaded = plugins._get_plugins()[0]
        if ElasticExecutor in loaded and ElasticLocalExecutor not in loaded:
            loaded.append(ElasticLocalExecutor)
        return functions.CLUSTERS[0]

    @classmethod
    def affinity(cls) -> int:
        """Never chosen unless asked for."""
        return -1 if shutil.which("sbatch") is None else 0

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        """Only those that no other executor has: AutoExecutor looks names without a prefix up in all of them."""
        own = {option.dest for option in LAUNCH_OPTIONS} | {"env"}
        return own - AutoExecutor._valid_parameters()

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        changed = {**self.parameters, **{_RENAMED.get(k, k): v for k, v in kwargs.items()}}
        self._spec(changed)
        self.parameters.update(changed)

    @property
    def _runs(self) -> Path:
        return runs_folder(self.folder)

    def _spec(self, parameters: Mapping[str, Any], count: int = 1) -> JobSpec:
        """The job of ``count`` functions. UsageError if there is none with these parameters."""
        options = {"nodes": "1", "job_name": "submitit", **_translated(parameters)}
        parallel = options.pop("array_parallelism", None)
        if count > 1:
            options["array"] = f"0-{count - 1}" + (f"%{parallel}" if parallel else "")
        output = "%A_%a.log" if count > 1 else "%j.log"
        return from_names(
            functions.MODULE,
            [str(self.folder)],
            module=True,
            setup=options.pop("setup", None) or (),
            env={**(options.pop("env", None) or {}), "SUBMITIT_EXECUTOR": functions.CLUSTERS[0]},
            options={"output": self._runs / output, **options, "log_dir": self._runs},
        )

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        spec = self._spec(self.parameters, len(delayed_submissions))
        pickles = self._dump(delayed_submissions)
        try:
            job = submit(spec)
        except BaseException:
            for path in pickles:
                path.unlink()
            raise
        ids = [job.id] if len(pickles) == 1 else [f"{job.id}_{task}" for task in range(len(pickles))]
        jobs: list[core.Job[Any]] = [self.job_class(self.folder, each) for each in ids]
        for each, path in zip(jobs, pickles, strict=True):
            each.paths.move_temporary_file(path, "submitted_pickle")
        jobs[0].paths.submission_file.write_text(render(spec))
        return jobs

    def _dump(self, delayed_submissions: Sequence[utils.DelayedSubmission]) -> list[Path]:
        """The pickles, under names of their own until the jobs have ids."""
        self._runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths = []
        for delayed in delayed_submissions:
            delayed.set_timeout(0, self.max_num_timeout)
            paths.append(self._runs.with_name(f"{uuid.uuid4().hex}.pkl"))
            delayed.dump(paths[-1])
            size = len(delayed_submissions) * paths[-1].stat().st_size / 1024**3
            if size > self.max_pickle_size_gb:
                for path in paths:
                    path.unlink()
                raise UsageError(
                    f"the pickled functions take about {size:.2f} GB, more than max_pickle_size_gb="
                    f"{self.max_pickle_size_gb:g}; load large data in the function, or raise it"
                )
        return paths


class ElasticLocalExecutor(ElasticExecutor):
    """Runs functions on this machine, without Slurm, a process for each node that the job may use. What describes the
    job to Slurm is of no use here, and not looked at.
    """

    job_class = ElasticLocalJob

    @classmethod
    def name(cls) -> str:
        return functions.CLUSTERS[1]

    @classmethod
    def affinity(cls) -> int:
        return 0

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return set()  # they have the prefix elastic_

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
        rundir = RunDir.new(self._runs, "local")
        launch = replace(spec.launch, grow=False)
        count = launch.nodes.max + launch.spares
        options = [f"{flag}={value}" for flag, value in launch.options()]
        options = [f"--local={count}", f"--run-dir={rundir.path}", *options, "--module"]
        srun = module_command(sys.executable, "elastic_hpc.cli.srun", *options)
        command = [*srun, launch.script, *launch.script_args]
        environ = {**os.environ, **{name: setting.value for name, setting in spec.env.items()}}
        with rundir.hold() as lock, open(f"{rundir.path}.log", "wb") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environ,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie
        return self.job_class(self.folder, rundir.path.name)


def _translated(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of submitit as options by name. UsageError for those that an elastic job cannot have."""
    options = dict(parameters)
    for name, reason in _REFUSED.items():
        if options.pop(name, None):
            raise UsageError(f"{name}: {reason}; leave it out")
    if not options.pop("use_srun", True):
        raise UsageError("use_srun=False: srun starts the agents; leave it out")
    gb = options.pop("mem_gb", None)
    if gb is not None:
        options["mem"] = f"{gb:.0f}G" if gb == int(gb) else f"{gb * 1024:.0f}M"
    return {**(options.pop("additional_parameters", None) or {}), **options}


def _parameters_for_us(given: Mapping[str, Any]) -> dict[str, Any]:
    """AutoExecutor's parameters: an option of ours wins over Slurm's of the same name, that over one without a prefix;
    those of other executors are not for us.
    """
    found: dict[str, dict[str, Any]] = {"": {}, "slurm": {}, "elastic": {}}
    for key, value in given.items():
        prefix, _, name = key.partition("_")
        if value is None or (prefix not in found and prefix in plugins.get_executors()):
            continue
        found[prefix if prefix in found else ""][name if prefix in found else key] = value
    return {_RENAMED.get(k, k): v for layer in found.values() for k, v in layer.items()}


_update_parameters = AutoExecutor._internal_update_parameters


def _update_parameters_of_ours(auto: AutoExecutor, **kwargs: Any) -> None:
    if isinstance(auto._executor, ElasticExecutor):
        auto._executor._internal_update_parameters(**_parameters_for_us(kwargs))
    else:
        _update_parameters(auto, **kwargs)


# AutoExecutor takes nodes for an int, and forgets slurm_* parameters when the cluster has another name. No other
# cluster is touched. tests/unit/test_submitit.py notices when submitit changes.
AutoExecutor._internal_update_parameters = _update_parameters_of_ours  # type: ignore[assignment,method-assign]
