"""torch's ``LocalElasticAgent`` with the waiting done on events: the one place that leans on its inner workings.

The methods overridden here are the ones that torch's documentation names as extension points; their signatures
drift between releases, hence ``*args, **kwargs``. ``tests/unit/test_torch_contract.py`` notices when torch changes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing import api as multiprocessing
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from elastic_hpc.membership.causes import explain
from elastic_hpc.membership.messages import Failure, Order, Plan, State
from elastic_hpc.membership.policy import TERM_GRACE, Policy
from elastic_hpc.record.stamps import Stamper
from elastic_hpc.record.stderr import tail
from elastic_hpc.training.drain import DRAIN_FILE
from elastic_hpc.training.progress import LOCAL_DIR, Progress
from elastic_hpc.workers import guard, stacks
from elastic_hpc.workers.drain import DrainSignals
from elastic_hpc.workers.memory import OomWatch
from elastic_hpc.workers.proc import exit_code
from elastic_hpc.workers.standbys import Standbys
from elastic_hpc.workers.watch import Watch

log = logging.getLogger(__name__)

_STEADY = 10.0
"""Seconds after which the next standbys are prepared, if the workers of the round report no steps."""

_STACKS_TIMEOUT = 8.0
"""Seconds that recording the stacks of hung workers may take."""


class Control(Protocol):
    """The agent's connection with the leader (``agent.bridge.Control``). ``must_stop`` raises JobEnded."""

    wake_fd: int
    """Readable when a new order has come."""

    @property
    def order(self) -> Order | None: ...
    def must_stop(self, round: int) -> str | None: ...
    def report(self, state: State, round: int, failure: Failure | None = None, *, drained: bool = False) -> None: ...
    def report_progress(self, progress: Progress, /) -> None: ...
    def report_start(self, *, warm: int, cold: int, why: str, standby_mb: float) -> None: ...
    def on_signal(self) -> None: ...


class Rendezvous(Protocol):
    """The rendezvous handler of the agent (``agent.rendezvous``)."""

    restart_wanted: bool
    """To be set when the workers of the current round may not go on."""

    @property
    def round(self) -> int: ...
    @property
    def plan(self) -> Plan: ...


class NodeLogs(LogsSpecs):
    """``logs/<requeue>.<round>/<node>/rank<k>.{out,err}`` in the run directory, also shown on the agent's own output.

    Where the folder cannot be made, the workers write to the agent's output alone.
    """

    def __init__(self, root: Path, run: int, node: str, shown: str | None = None) -> None:
        """``shown``: the local ranks whose output is, ``0,1``; None for all."""
        super().__init__(log_dir=str(root))
        self._root, self._run, self._node = root, run, node
        self._shown = None if shown is None else set(map(int, shown.split(",")))

    @property
    def root_log_dir(self) -> str:
        return str(self._root)

    @property
    def folder(self) -> Path:
        """Of the current round."""
        return self._root / f"{self._run}.{os.environ['ELASTIC_HPC_ROUND']}" / self._node

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        folder = self.folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for env in envs.values():  # torch would fail where it opens them
                for kind in ("out", "err"):
                    (folder / f"rank{env['RANK']}.{kind}").touch(mode=0o600)
        except OSError as error:
            print(f"{folder}: {error.strerror}; the workers' output goes to this agent's alone", file=sys.stderr)
            return LogsDest(dict.fromkeys(envs, ""), dict.fromkeys(envs, ""), {}, {}, dict.fromkeys(envs, os.devnull))
        paths: dict[str, dict[int, str]] = {
            kind: {local: str(folder / f"rank{env['RANK']}.{kind}") for local, env in envs.items()}
            for kind in ("out", "err", "error.json")
        }
        for local, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = paths["error.json"][local]
        out, err = (
            {local: path for local, path in paths[kind].items() if self._shown is None or local in self._shown}
            for kind in ("out", "err")
        )
        return LogsDest(paths["out"], paths["err"], out, err, paths["error.json"])


class _Handler(SubprocessHandler):
    """torch's own, which is handed a standby where it would make a process, as far as there is one.

    That place is private. A release that has moved it starts all workers as torch does.
    """

    def __init__(self, standbys: Standbys, **kwargs: Any) -> None:
        self._standbys = standbys
        super().__init__(**kwargs)

    @classmethod
    @contextlib.contextmanager
    def used(cls, standbys: Standbys) -> Iterator[None]:
        """What torch's agent starts meanwhile is made by this class."""
        before = multiprocessing.get_subprocess_handler
        multiprocessing.get_subprocess_handler = functools.partial(cls, standbys)
        try:
            yield
        finally:
            multiprocessing.get_subprocess_handler = before

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        outputs = [file.fileno() if file else number for number, file in ((1, self._stdout), (2, self._stderr))]
        standby = self._standbys.take(args, env, outputs)
        made: subprocess.Popen[bytes] = standby or super()._popen(args, env)
        return made


class ElasticAgent(LocalElasticAgent):
    """Runs one node's workers; the leader, through ``control``, says when they start and stop."""

    _pcontext: Any

    def __init__(
        self,
        spec: WorkerSpec,
        logs: NodeLogs,
        control: Control,
        mark: bytes,
        node: str,
        policy: Policy,
        hang_timeout: timedelta | None,
        standbys: Standbys,
        signals: DrainSignals,
    ) -> None:
        """``mark``: what all workers have in their environment."""
        super().__init__(spec, logs_specs=logs, log_line_prefix_template="[rank${rank}]: ")
        self._mark = mark
        self._control = control
        self._logs = logs
        self._node = node
        self._standbys = standbys
        self._policy = policy
        self._exits: dict[int, int] = {}
        """pidfd of every worker of the round, by its pid."""
        self._closing: threading.Thread | None = None
        self._started_at = 0.0
        self._watch = Watch(hang_timeout, policy.heartbeat_timeout)
        self._oom = OomWatch()
        self._stamper = Stamper()
        self._signals = signals
        self._told_to_drain = False
        self._signalled: tuple[SignalException, float] | None = None

    def handle_signals(self) -> None:
        """In the main thread. torch sets handlers of its own whenever it starts workers."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Slurm wants the job to end, or somebody wants this agent to."""
        number = signal.Signals(signum)
        leaving = SignalException(f"got {number.name}", number)
        if not self._exits:
            raise leaving
        if self._signalled is None:
            self._signalled = leaving, time.monotonic()
            self._control.on_signal()

    @property
    def _handler(self) -> Rendezvous:
        handler: Rendezvous = self._worker_group.spec.rdzv_handler
        return handler

    def _start_workers(self, worker_group: WorkerGroup, *args: Any, **kwargs: Any) -> dict[int, Any]:
        # torch derives TORCHELASTIC_RESTART_COUNT from this agent's own remaining restarts; the job's count replaces it
        self._remaining_restarts = worker_group.spec.max_restarts - self._handler.plan.restart_count
        self._oom = OomWatch()
        self._told_to_drain = False
        self._signals.begin()
        self._standbys.begin()
        with _Handler.used(self._standbys):
            ids: dict[int, Any] = super()._start_workers(worker_group, *args, **kwargs)
        self.handle_signals()
        self._control.report("running", self._handler.round)
        self._exits = {pid: os.pidfd_open(pid) for pid in ids.values()}
        outputs = [path for paths in (self._pcontext.stdouts, self._pcontext.stderrs) for path in paths.values()]
        self._watch.start(list(ids.values()), outputs)
        self._started_at = time.monotonic()
        self._stamper.start(outputs)
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup, *_args: Any, **_kwargs: Any) -> RunResult:
        """Sleep until a worker exits or the leader has news. A failure is the leader's to judge, never this node's:
        it is reported, and torch is told to restart, which waits for the next round.
        """
        self._wait_for_news()
        if self._control.must_stop(self._handler.round):
            order = self._control.order
            if order and order.stacks:
                self._record_stacks()
            return self._stop_for_next_round()
        codes = {worker: self._exit_code(worker) for worker in worker_group.workers}
        failed = [worker for worker, code in codes.items() if code]
        drained = bool(failed) and self._ended_by_drain(failed)
        if failed and not drained:
            self._report_progress()
            self._control.report("failed", self._handler.round, self._failure(failed))
            return self._stop_for_next_round()
        if None in codes.values():
            self._look_after(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        self._kill_workers()  # what they left running
        self._report_progress()
        if drained:
            log.info("the drain ended %s", self._failure(failed))
        drained = drained or self._signals.told or self._watch.progress.drained
        self._control.report("succeeded", self._handler.round, drained=drained)
        while not self._control.must_stop(self._handler.round):  # raises JobEnded when all nodes have finished
            self._wait_for_news()
        return self._stop_for_next_round()

    def _look_after(self, worker_group: WorkerGroup) -> None:
        """What is to be done while workers run: pass on a drain, see how far they are, and whether they stand still."""
        if self._draining and not self._told_to_drain:
            self._told_to_drain = True
            Path(os.environ[LOCAL_DIR], DRAIN_FILE).touch()
        self._report_progress()
        living = {w.id: self._exits[w.id] for w in worker_group.workers if self._exit_code(w) is None}
        listens = self._watch.progress.listens
        if self._told_to_drain and not listens:
            self._signals.tell(living, got=self._signalled[0].sigval if self._signalled else 0)
            self._report_progress()
        if self._signalled:
            leaving, since = self._signalled
            hears = listens or self._signals.can_tell(living)
            patience = min(TERM_GRACE, self._policy.grace) if hears and self._told_to_drain else 1.0
            if not hears or time.monotonic() - since > patience:
                raise leaving
        elif trouble := self._watch.trouble():
            worker = next((w for w in worker_group.workers if w.id == trouble.pid), worker_group.workers[0])
            if trouble.kind == "hang":
                self._record_stacks()
            failure = Failure(
                trouble.kind, self._node, worker.global_rank, worker.local_rank, 0, trouble.message, time.time()
            )
            self._control.report("failed", self._handler.round, failure)
            self._watch.stop()
            while not self._control.must_stop(self._handler.round):
                self._wait_for_news()

    @property
    def _draining(self) -> bool:
        """Whether the workers of this round shall save and stop."""
        order = self._control.order
        return order is not None and order.drain and order.round == self._handler.round

    def _ended_by_drain(self, failed: list[Worker]) -> bool:
        """Whether ``failed``, which end with an exit code or by a signal, were drained: they were told to by a signal,
        or those who were have left them alone in a collective.
        """
        return self._draining and (self._signals.told or self._failure(failed).collateral)

    def _report_progress(self) -> None:
        self._watch.look()
        progress = self._watch.progress
        self._control.report_progress(progress._replace(listens=progress.listens or self._signals.told))
        going = self._watch.progress.step >= 0 or time.monotonic() - self._started_at > _STEADY
        self._standbys.look(going=going and not self._told_to_drain)
        self._control.report_start(**vars(self._standbys.started))

    def _record_stacks(self) -> None:
        if self._watch.stacks_recorded:
            return
        self._watch.stacks_recorded = True
        pids = {f"rank{worker.global_rank}": worker.id for worker in self._worker_group.workers}
        written = stacks.dump(pids, self._logs.folder, timeout=_STACKS_TIMEOUT)
        log.info("the workers stand still; their stacks are in %s", ", ".join(map(str, written)) or "no file")

    def _stop_for_next_round(self) -> RunResult:
        self._handler.restart_wanted = True
        return RunResult(state=WorkerState.HEALTHY)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Workers of a broken round are stuck in a collective: they are killed at once. Only a signal to this agent,
        which Slurm sends to the workers too, leaves them time.
        """
        leaving = sys.exc_info()[1]
        if isinstance(leaving, SignalException):
            super()._shutdown(*args, **{**kwargs, "timeout": int(min(TERM_GRACE, self._policy.grace))})
        self._kill_workers()
        self._stamper.stop()
        context, self._pcontext = self._pcontext, None
        super()._shutdown(*args, **kwargs)
        if context:  # reaps, and shows the last lines of output; the next round does not wait for that
            self._closing = threading.Thread(target=context.close, name="close", daemon=True)
            self._closing.start()
        if leaving and self._closing:
            self._closing.join(timeout=5)
        for fd in self._exits.values():
            os.close(fd)
        self._exits = {}

    def _wait_for_news(self) -> None:
        poll = select.poll()
        poll.register(self._control.wake_fd, select.POLLIN)
        for worker in self._worker_group.workers:
            if self._exit_code(worker) is None:
                poll.register(self._exits[worker.id], select.POLLIN)
        poll.poll(1000)

    def _exit_code(self, worker: Worker) -> int | None:
        return exit_code(self._exits[worker.id])

    def _kill_workers(self) -> None:
        """SIGKILL to the workers and to all that they have started; wait until the workers are dead."""
        if not self._exits:
            return
        guard.kill_all(self._mark, self._standbys.waiting)
        for fd in self._exits.values():
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()

    def _failure(self, failed: list[Worker]) -> Failure:
        """The first failure among ``failed`` that is no echo of another: the one whose error file is oldest, else the
        lowest rank.
        """
        assert self._pcontext is not None
        reports = []
        for worker in failed:
            code, local = self._exit_code(worker) or 0, worker.local_rank
            cause = explain(code, tail(self._pcontext.stderrs[local]), oom=self._oom.happened())
            when = time.time()
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                recorded = json.loads(Path(self._pcontext.error_files[local]).read_text())["message"]
                when = float(recorded["extraInfo"]["timestamp"])
            reports.append(
                Failure(
                    cause.kind,
                    self._node,
                    worker.global_rank,
                    local,
                    code,
                    cause.message[:2000],
                    when,
                    (cause.traceback or "")[:8192],
                    cause.collateral,
                )
            )
        return min(reports, key=lambda report: (report.collateral, report.time))
