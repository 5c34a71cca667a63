"""Adapts a worker that runs a function to the assumptions of functions written for submitit's Slurm cluster.

Such functions form their own process group, from ``submitit.JobEnvironment`` and a port that they choose: by the helper
``TorchDistributedEnvironment``, by similar lines, or through a file. Under Slurm, rank 0 hosts the store for that.
Under agents, torch's workers only connect to the agents' store, and a file would be left over from the last round.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from submitit import helpers
from submitit.core import job_environment, utils

from elastic_hpc.errors import ElasticError
from elastic_hpc.network.client import ask_leader
from elastic_hpc.record.folders import is_there
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.training.drain import is_told_to_drain
from elastic_hpc.training.progress import listen, mark_drained

_RENDEZVOUS = "torch.distributed.rendezvous"

_POLL = 0.2
_LEAVE = 5.0
"""Seconds that rank 0, which has saved, waits for the other ranks to leave."""


def adapt() -> None:
    """Change submitit's helper, and torch's ways to form a process group, in this process. Call this once, before the
    function runs: it may change the variables that the agent has set.
    """
    meeting = Meeting()
    meeting.adapt_helper(helpers.TorchDistributedEnvironment)
    if _RENDEZVOUS in sys.modules:
        meeting.adapt_torch(sys.modules[_RENDEZVOUS])
    else:
        sys.meta_path.insert(0, _WhenImported(_RENDEZVOUS, meeting.adapt_torch))


class Meeting:
    """The place where the workers of this round meet, from the variables that their agent has set."""

    def __init__(self) -> None:
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._rank0, self._round = os.environ["ELASTIC_HPC_RANK0_ADDR"], os.environ["ELASTIC_HPC_ROUND"]
        self._rank_and_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])

    def adapt_helper(self, helper: type) -> None:
        """Give the helper this round's store, and let it export variables again, which changes nothing."""
        init, export = helper.__init__, helper.export  # type: ignore[misc, attr-defined]

        def init_for_round(env: Any) -> None:
            init(env)
            env.local_world_size = self._local_world_size
            if env.master_port == self._port:
                env.master_addr = self._host

        def export_again(env: Any, set_cuda_visible_devices: bool = True, overwrite: bool = True) -> Any:
            del overwrite
            return export(env, set_cuda_visible_devices, overwrite=True)

        helper.__init__ = init_for_round  # type: ignore[misc]
        helper.export = export_again  # type: ignore[attr-defined]

    def adapt_torch(self, rendezvous: ModuleType) -> None:
        """At the agents' port, torch uses the store of the agents. At another port rank 0 hosts the store, as without
        torchrun, and a world of all ranks connects to the host of rank 0, whatever host the function has derived. Each
        round has a file of its own.
        """
        create, file_store = rendezvous._create_c10d_store, rendezvous.FileStore

        def create_store(host: str, port: int, rank: int, world_size: int, *args: Any, **kwargs: Any) -> Any:
            is_agents = port == self._port
            rendezvous._torchelastic_use_agent_store = lambda: is_agents  # type: ignore[attr-defined]
            if is_agents:
                host = self._host
            elif (rank, world_size) == self._rank_and_size:
                host = self._rank0
            return create(host, port, rank, world_size, *args, **kwargs)

        def create_file_store(path: str, *args: Any) -> Any:
            return file_store(f"{path}.round-{self._round}", *args)

        rendezvous._create_c10d_store = create_store  # type: ignore[attr-defined]
        rendezvous.FileStore = create_file_store  # type: ignore[attr-defined]


class _WhenImported:
    """On ``sys.meta_path``: changes one module as soon as it has been imported. Stays there, because an import in
    another thread may be reading the list.
    """

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != self._name:
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self.given()

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec

    def given(self) -> None:
        """Change the module. A standby also calls this when it installs modules that it imported ahead
        (``workers.aside``).
        """
        if module := sys.modules.get(self._name):
            self._name = ""
            self._change(module)


class DrainHandler(job_environment.SignalHandler):
    """submitit's handler, triggered by the agent: rank 0 checkpoints, then all ranks leave. The agents requeue."""

    def __init__(
        self,
        env: job_environment.JobEnvironment,
        paths: utils.JobPaths,
        delayed: utils.DelayedSubmission,
        run_dir: Path,
    ) -> None:
        super().__init__(env, paths, delayed)
        self._rundir = RunDir(run_dir)
        self._paths = paths
        self._rank, self._size = env.global_rank, env.num_tasks
        self._pid = os.getpid()
        self._saved = paths.result_pickle.with_name("saved")

    def start(self) -> None:
        listen()
        if self._rank == 0:
            signal.signal(signal.SIGUSR2, self.checkpoint_and_try_requeue)
            signal.signal(signal.SIGTERM, self.checkpoint_and_try_requeue)  # a preemption without a warning
        else:
            signal.signal(signal.SIGTERM, self.bypass)
        threading.Thread(target=self._watch, name="drain", daemon=True).start()

    def _watch(self) -> None:
        while not is_told_to_drain():
            if self._saved.exists():
                break
            time.sleep(_POLL)
        if self._rank == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
            return
        while not is_there(self._saved):
            time.sleep(_POLL)
        mark_drained()
        self._left(self._rank).touch()
        os._exit(0)  # the main thread may be in a collective that rank 0 has left

    def _left(self, rank: int) -> Path:
        return self._saved.with_name(f"left.{rank}")

    def has_timed_out(self) -> bool:
        """Whether the agents stop the workers because of the time limit, not a preemption, the user, or a new world."""
        reasons = [event["reason"] for event in self._rundir.events() if event["event"] in {"request", "drain"}]
        return reasons[-1:] == ["time limit"]

    def checkpoint_and_try_requeue(self, signum: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self._pid:  # a data loader has inherited this handler
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
            return
        for name in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(name, self.bypass)  # one checkpoint is enough
        try:
            super().checkpoint_and_try_requeue(signum, frame)
        except utils.UncompletedJobError as error:
            utils.cloudpickle_dump(("error", str(error)), self._paths.result_pickle)
            with contextlib.suppress(ElasticError):
                ask_leader(self._rundir, "stop", str(error))
            raise

    def _exit(self) -> None:
        mark_drained()
        self._saved.touch()
        end, others = time.monotonic() + _LEAVE, {self._left(rank).name for rank in range(1, self._size)}
        while time.monotonic() < end and not others.issubset(os.listdir(self._saved.parent)):
            time.sleep(_POLL)
        os._exit(0)
