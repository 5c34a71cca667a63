"""``elastic_launch`` runs a function or a script, from Python, on the nodes of the allocation or on this machine. It
has the interface of ``torch.distributed.launcher.api``, and runs ``elastic-srun``.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_hpc.environment import AGENT_MARK
from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.job import functions
from elastic_hpc.options import from_python, torchrun
from elastic_hpc.options.table import IN_ALLOCATION, WITHOUT_SLURM
from elastic_hpc.record.folders import make_log_dir
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.start import module_command

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from elastic_hpc.job.typed import LaunchOptions


class LaunchFailed(ElasticError):
    """The workers have not finished. The message includes the traceback of the first failure, if any worker failed."""

    def __init__(self, text: str, run_dir: Path, verdict: Mapping[str, Any] | None) -> None:
        super().__init__(text)
        self.run_dir = run_dir
        self.verdict = verdict
        """The record in ``verdict.json``: ``outcome``, ``cause``, ``reason``, ``failure``; None if there is none."""


class LaunchConfig:
    """How a launch runs: the launch options of ``elastic-srun``, with ``_`` for ``-``."""

    def __init__(
        self,
        *,
        local: int | None = None,
        log_dir: str | os.PathLike[str] = "elastic-logs",
        **options: Unpack[LaunchOptions],
    ) -> None:
        """``local``: the number of agents to run as processes on this machine, without Slurm; None for the nodes of the
        allocation. ``log_dir``: the folder in which each launch makes its run directory. ``options`` have values as in
        ``JobSpec.of``. Raises UsageError for options that do not exist and values that do not fit.

        ``LaunchConfig(nodes=(2, 4), nproc_per_node=8, max_restarts=3)``
        """
        known = {option.flag: option for option in (IN_ALLOCATION if local is None else WITHOUT_SLURM)}
        if local is not None and (isinstance(local, bool) or not hasattr(local, "__index__") or local < 1):
            raise UsageError(f"local={local!r}: expected a number of agents above 0, for example local=4")
        self.local, self.log_dir = local, Path(from_python.word(log_dir, "log_dir")).absolute()
        self.options: list[str] = []
        ours, torchruns = torchrun.translate(from_python.options(options)[0])
        for option in torchruns:
            torchrun.unneeded(option)
        for option in ours:
            if option.flag not in known:
                where = "in an existing allocation" if local is None else "without Slurm"
                raise UsageError(
                    f"{option.name.replace('-', '_')}: is no option of elastic_launch, which runs {where}; expected "
                    f"one of {', '.join(option.dest for option in known.values())}"
                )
            known[option.flag].parse(option.value or "")
            self.options.append(f"{option.flag}={option.value}")

    def command(self, run_dir: Path, script: str, *script_args: str, module: bool = False) -> list[str]:
        """The command that runs ``script``."""
        where = [] if self.local is None else [f"--local={self.local}"]
        how = [*self.options, *(["--module"] if module else [])]
        options = [*where, f"--run-dir={run_dir}", *how]
        return module_command(sys.executable, "elastic_hpc.cli.srun", *options, script, *script_args)


class elastic_launch:  # noqa: N801 - torch's name
    """``elastic_launch(config, train)(1e-3)``: the counterpart of torch's class of this name.

    ``entrypoint``: a function, which is pickled with its arguments (cloudpickle) and called on every rank, or the path
    of a script, whose arguments are strings.
    """

    def __init__(self, config: LaunchConfig, entrypoint: Callable[..., Any] | str | os.PathLike[str]) -> None:
        if not (callable(entrypoint) or isinstance(entrypoint, (str, os.PathLike))):
            raise UsageError(f"entrypoint {entrypoint!r}: expected a function, or the path of a script")
        self._config = config
        self._entrypoint = entrypoint

    def __call__(self, *args: Any) -> dict[int, Any]:
        """Run the workers to their end. Returns what each rank of the last world has returned, by rank; empty for a
        script.

        Raises LaunchFailed if the workers have not finished. The first Ctrl-C lets the workers save and stop; the
        second stops them.
        """
        make_log_dir(self._config.log_dir)
        run_dir = self._config.log_dir / f"launch.{secrets.token_hex(4)}"
        if isinstance(self._entrypoint, (str, os.PathLike)):
            words = [from_python.word(part, "argument of the script") for part in (self._entrypoint, *args)]
            rundir = RunDir(run_dir).create()
            _run(self._config.command(run_dir, *words), os.environ)
            _outcome(rundir)
            return {}
        rundir = RunDir(run_dir).create()
        functions.write(self._entrypoint, args, run_dir, run_dir)
        _run(self._config.command(run_dir, functions.MODULE, str(run_dir), module=True), functions.environ())
        world = _outcome(rundir)
        results = functions.results_folder(run_dir, world["round"])
        return {rank: functions.result(results / f"{rank}.pkl") for rank in range(world["world_size"])}


def _run(command: list[str], environ: Mapping[str, str]) -> None:
    # In another session, so that Ctrl-C reaches only this process; but in a worker in the worker's session, to die with
    # the worker.
    alone = AGENT_MARK not in os.environ
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=alone)
    while True:
        try:
            process.wait()
            return
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _outcome(rundir: RunDir) -> Mapping[str, Any]:
    """The last world, if its workers have finished."""
    verdict = rundir.read("verdict.json")
    if verdict and verdict["outcome"] == "finished":
        return rundir.last_round()
    if not verdict:
        raise LaunchFailed(
            f"the agents left no verdict; see their messages above, and {rundir.path}", rundir.path, None
        )
    trace = f"\n{verdict['failure']['traceback']}" if verdict["failure"] else ""
    raise LaunchFailed(f"{verdict['outcome']}: {verdict['reason']} ({rundir.path}){trace}", rundir.path, verdict)
