"""This project's membership under a stock ``torchrun``: what torch's agent does not report is observed from outside.

torch's agent asks the handler for the next round, and ten times a second whether to restart its workers. It reports
neither which processes its workers are nor why it restarts them. So the handler finds the workers by the mark in their
environment, and watches them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousInfo, RendezvousParameters

from elastic_hpc.agent.assembly import Assembly
from elastic_hpc.agent.rendezvous import ElasticRendezvousHandler
from elastic_hpc.environment import forget_enclosing
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.membership.causes import explain
from elastic_hpc.membership.messages import Failure
from elastic_hpc.network import addresses
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.torchrun.settings import Settings, leads_at_first, place, read_settings
from elastic_hpc.workers import guard, proc
from elastic_hpc.workers.memory import OomWatch
from elastic_hpc.workers.watch import Watch

log = logging.getLogger("elastic_hpc")


def _begin(rundir: RunDir) -> None:
    """Count this start. If a job of this name has ended, begin a new job: keep the record and the number of its last
    round, and count the restarts from 0.
    """
    rundir.write("starts.json", {"starts": _starts(rundir) + 1})
    if rundir.read("verdict.json"):
        rundir.write("state.json", {**(rundir.read("state.json") or {}), "restarts": 0})
        rundir.forget_verdict()
    for path in rundir.path.glob("began.*"):
        path.unlink()


def _began(env: AgentEnv, rundir: RunDir) -> bool:
    """Whether an agent of this node began in this job before. Records that this agent begins."""
    path = _began_path(env, rundir)
    before = path.exists() and not rundir.read("verdict.json")  # else the job of this name has ended
    path.touch(0o600)
    return before


def _began_path(env: AgentEnv, rundir: RunDir) -> Path:
    return rundir.path / f"began.{env.run}.{env.node}"


def _starts(rundir: RunDir) -> int:
    return int((rundir.read("starts.json") or {}).get("starts", 0))


def join(parameters: RendezvousParameters) -> TorchrunHandler:
    """Make the handler for torch's agent, which looks for the leader, or leads, from now on. Raises ElasticError."""
    settings = read_settings(parameters)
    spec, rundir = settings.spec, RunDir(settings.run_dir).create()
    forget_enclosing(os.environ)
    environ, env = dict(os.environ), place(settings, rundir)
    parts = Assembly(spec, env, rundir, settings.nproc, environ, can_requeue=False)
    is_alone = spec.nodes.max == 1
    goes_on = not is_alone and parts.remember(again=_began(env, rundir))
    first = not goes_on and leads_at_first(settings, env, rundir)
    if first:
        _begin(rundir)
    if first and not is_alone:
        parts.remember(again=False)
    parts.connect(_published(settings, env, parameters.local_addr), first=first)
    handler = TorchrunHandler(parts)
    parts.control.start()
    return handler


def _published(settings: Settings, env: AgentEnv, given: str | None) -> tuple[str, ...]:
    """The addresses of this node; ``given`` is torchrun's ``--local-addr``."""
    if given:
        return tuple(addresses.resolve(given)) or (given,)
    by_hand, spec = env.local, settings.spec
    alone = (addresses.LOOPBACK,)
    if by_hand and spec.rdzv_endpoint.head is None and spec.nodes.max == 1:  # no other node will come
        return alone
    try:
        return addresses.to_publish(os.uname().nodename if by_hand else env.name, spec.interface, env.submit_host)
    except ElasticError:
        if by_hand and spec.rdzv_endpoint.is_loopback:  # all agents are on this machine
            return alone
        raise


class _ExitBarrier:
    """The store at which torch's agent waits when its workers have finished, until the job has finished."""

    timeout = timedelta(0)

    def __init__(self, wait_for_all: Callable[[], None]) -> None:
        self._wait_for_all = wait_for_all

    def set_timeout(self, timeout: timedelta) -> None:
        """Does nothing: the leader notices when agents are lost, so no timeout is needed."""

    def add(self, _key: str, _amount: int) -> int:
        return 0

    def wait(self, _keys: list[str], *_timeout: timedelta) -> None:
        self._wait_for_all()


class TorchrunHandler(ElasticRendezvousHandler):
    """Watches the workers of a stock agent for the leader, and kills them on the leader's order.

    It kills the workers after torch's agent has looked at them, and before that agent asks whether to restart. So
    torch's agent treats the restart as a change of membership, which costs none of its ``--max-restarts``, and waits
    for no worker.
    """

    def __init__(self, parts: Assembly) -> None:
        super().__init__(parts)
        self._lock = threading.Lock()
        self._watched_round = 0
        self._reported = False
        """Whether the leader knows how the workers of this round ended, or has ended them itself."""

    @property
    def run(self) -> int:
        """How often a job of this name was started. No variable says this, so the agent that leads at first counts the
        starts. Read each time, because several agents may claim the lead and count.
        """
        return _starts(self._parts.rundir)

    def get_backend(self) -> str:
        return "elastic-hpc"

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next round. SystemExit ends torchrun when the job has finished without this node."""
        self._report_failure(self.round, None)
        self._kill_workers()  # processes that failed workers have left running
        try:
            info = super().next_rendezvous()
        except JobEnded as over:
            _end(over)
        with self._lock:
            self._reported = False
        return RendezvousInfo(_ExitBarrier(self._wait_for_all), info.rank, info.world_size, info.bootstrap_store_info)

    def num_nodes_waiting(self) -> int:
        """Called while all workers of this node live."""
        if self._watched_round != self.round:
            self._watched_round = self.round
            self._watch(self.round)
        try:
            stop = self._control.must_stop(self.round)
        except JobEnded as over:
            self._kill_workers()
            _end(over)
        if stop:
            self._kill_workers()
            self.restart_wanted = True
        return super().num_nodes_waiting()

    def shutdown(self) -> bool:
        """Called when torch's agent gives up, or when its workers have finished."""
        self._report_failure(self.round, None)
        self._parts.close()
        if self._parts.rundir.read("verdict.json"):  # the next job of this name begins from scratch
            _began_path(self._parts.env, self._parts.rundir).unlink(missing_ok=True)
        shutil.rmtree(self._parts.local_folder, ignore_errors=True)
        return True

    def _watch(self, round: int) -> None:
        self._control.report("running", round)
        workers = {}
        for pid in guard.marked(self._parts.mark):
            with contextlib.suppress(ProcessLookupError):  # it has ended, which torch's agent notices too
                if proc.parent(pid) == os.getpid():
                    workers[os.pidfd_open(pid)] = pid, int(proc.variable(pid, "LOCAL_RANK") or 0)
        threading.Thread(target=self._look_after, args=(round, workers), name=f"workers-{round}", daemon=True).start()

    def _look_after(self, round: int, workers: dict[int, tuple[int, int]]) -> None:
        """Report at once when a worker fails. torch's agent would first stop the others."""
        oom, watch, poll = OomWatch(), Watch(None, 0), select.poll()
        watch.start([pid for pid, _ in workers.values()])
        for pidfd in workers:
            poll.register(pidfd, select.POLLIN)
        living = set(workers)
        while living and not self._is_over(round):
            for pidfd, _ in poll.poll(1000):
                poll.unregister(pidfd)
                living.discard(pidfd)
                code = proc.exit_code(pidfd)
                if code and self._report_failure(round, code, workers[pidfd][1], oom=oom.happened()):
                    _wait_until_reaped(pidfd)  # else torch might report a sibling killed here as the first failure
                    for sibling in living:  # no other process: the next round may have begun
                        with contextlib.suppress(ProcessLookupError):
                            signal.pidfd_send_signal(sibling, signal.SIGKILL)
            if not self._is_over(round):
                watch.look()
                self._control.report_progress(watch.progress._replace(listens=False))
        for pidfd in workers:
            os.close(pidfd)

    def _is_over(self, round: int) -> bool:
        return self._reported or round != self.round

    def _report_failure(self, round: int, code: int | None, local: int = 0, *, oom: bool = False) -> bool:
        """Report that a worker of ``round`` has failed, unless that was reported. ``code`` is None if torch's agent has
        noticed the failure, because it does not pass the exit code on.
        """
        with self._lock:
            if self._is_over(round) or not self.seat:
                return False
            self._reported = True
        cause = explain(code or 1, "", oom=oom)
        message = cause.message if code else "a worker failed; see the output of torchrun"
        rank = self.plan.group_rank * self._parts.nproc + local
        # the exit code does not show whether the death of another rank caused this failure
        collateral = cause.kind == "exit"
        node, now = self._parts.env.name, time.time()
        failure = Failure(cause.kind, node, rank, local, code or 1, message, now, "", collateral, cause.known)
        self._control.report("failed", round, failure)
        return True

    def _kill_workers(self) -> None:
        """Kill the workers at once: in a broken round they are stuck in a collective."""
        with self._lock:
            self._reported = True
        guard.kill_all(self._parts.mark)

    def _wait_for_all(self) -> None:
        """All workers of this node have finished: wait until the job has."""
        self._kill_workers()  # processes that the workers left running
        self._control.report("succeeded", self.round)
        try:
            while not (stop := self._control.must_stop(self.round)):
                select.select([self._control.wake_fd], [], [], 1.0)
            log.info("this node's workers have finished; the node leaves the job, which continues: %s", stop)
        except JobEnded as over:
            if not over.logged and over.outcome != "finished":
                log.info("%s: %s", over.outcome, over.reason)


def _end(over: JobEnded) -> NoReturn:
    if not over.logged:
        log.info("%s: %s", over.outcome, over.reason)
    if over.outcome == "finished":
        raise SystemExit(0) from None
    raise RendezvousClosedError(over.reason) from None


def _wait_until_reaped(pidfd: int) -> None:
    end = time.monotonic() + 2
    while proc.exit_code(pidfd) and time.monotonic() < end:
        time.sleep(0.01)
