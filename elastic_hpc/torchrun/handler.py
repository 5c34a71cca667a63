"""This project's membership under a stock ``torchrun``: what its agent does not tell is seen from outside.

torch's agent asks the handler for the next round, and ten times a second whether to restart its workers. It says
neither what its workers are nor why it restarts them, so they are found by the mark in their environment and watched.
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
from typing import NoReturn

from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousInfo, RendezvousParameters

from elastic_hpc.agent.bridge import Control
from elastic_hpc.agent.leading import Leading
from elastic_hpc.agent.main import (
    CONTROL_PORT_OFFSET,
    make_local_folder,
    network,
    new_mark,
    policy_of,
    software,
    start_guard,
    start_log,
)
from elastic_hpc.agent.rendezvous import ElasticRendezvousHandler
from elastic_hpc.environment import AGENT_MARK, forget_enclosing, prepare_worker_env
from elastic_hpc.errors import JobEnded
from elastic_hpc.membership.causes import explain
from elastic_hpc.membership.messages import Failure
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.server import LEAVE_TIMEOUT
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.torchrun.plugin import BACKEND
from elastic_hpc.torchrun.settings import is_loopback, leads_at_first, place, read_settings
from elastic_hpc.workers import guard, proc
from elastic_hpc.workers.memory import OomWatch
from elastic_hpc.workers.watch import Watch

log = logging.getLogger("elastic_hpc")


class _TorchrunLeading(Leading):
    """No agent is started anew and no node is brought: there is no command of ours to start on it."""

    @property
    def _supplies(self) -> bool:
        return False


def _begin(rundir: RunDir) -> None:
    """A job of this name that has ended leaves its record and the number of its last round, not its budget."""
    if rundir.read("verdict.json"):
        rundir.write("state.json", {**(rundir.read("state.json") or {}), "restarts": 0})
        (rundir.path / "verdict.json").unlink()


def join(parameters: RendezvousParameters) -> TorchrunHandler:
    """Put together what ``elastic_hpc.agent`` does, for torch's agent. Raises ElasticError."""
    settings = read_settings(parameters)
    spec, rundir = settings.spec, RunDir(settings.run_dir).create()
    forget_enclosing(os.environ)
    environ, env = dict(os.environ), place(settings, rundir)
    token = new_mark(os.environ)
    prepare_worker_env(os.environ, env.cpus, settings.nproc, token, run_dir=str(rundir.path))
    listener, local_folder = start_log(rundir, env), make_local_folder()
    pipe = start_guard(token, 1.5 * spec.heartbeat_timeout.total_seconds(), local_folder)

    policy = policy_of(spec, settings.nproc, can_requeue=False)
    server_socket = addresses.listen_from(spec.rdzv_endpoint.port + CONTROL_PORT_OFFSET)
    if parameters.local_addr:
        published: tuple[str, ...] = (parameters.local_addr,)
    elif is_loopback(spec.rdzv_endpoint.host):
        published = ("127.0.0.1",)
    else:
        published = addresses.to_publish(
            os.uname().nodename if env.local else env.name, spec.interface, env.submit_host
        )
    me = Host(env.node, env.name, published, server_socket.getsockname()[1], software())
    leading = _TorchrunLeading(spec, env, me, settings.nproc, policy, rundir, environ)
    first = leads_at_first(settings, env, rundir)
    if first:
        _begin(rundir)
        leading.prepare()
    control = Control(
        me,
        settings.nproc,
        lambda: network(server_socket, rundir, policy),
        leading,
        heartbeat_timeout=policy.heartbeat_timeout,
        join_timeout=policy.join_timeout,
        first=first,
        beat=lambda: guard.beat(pipe),
    )

    def close() -> None:
        control.close(timeout=LEAVE_TIMEOUT + 20)
        if leading.recorder:
            leading.recorder.close()
        listener.stop()
        shutil.rmtree(local_folder, ignore_errors=True)

    handler = TorchrunHandler(control, parameters.run_id, environ.get("GLOO_SOCKET_IFNAME"), local_folder)
    handler.attach(env.name, settings.nproc, token, close)
    control.start()
    return handler


class _ExitBarrier:
    """The store that torch's agent waits on when its workers have finished: until the job has."""

    timeout = timedelta(0)

    def __init__(self, wait_for_all: Callable[[], None]) -> None:
        self._wait_for_all = wait_for_all

    def set_timeout(self, timeout: timedelta) -> None:
        """The leader knows who is still there: no timeout is needed."""

    def add(self, _key: str, _amount: int) -> int:
        return 0

    def wait(self, _keys: list[str], *_timeout: timedelta) -> None:
        self._wait_for_all()


class TorchrunHandler(ElasticRendezvousHandler):
    """Watches the workers of a stock agent for the leader, and kills them when it says so.

    They are killed between the agent's look at them and its question whether to restart: so it takes the restart for a
    change of membership, which costs none of its ``--max-restarts``, and finds nobody to wait for.
    """

    def attach(self, node: str, nproc: int, token: str, close: Callable[[], None]) -> None:
        """``token`` marks the workers; ``close`` leaves the job."""
        self._node, self._nproc = node, nproc
        self._token = f"{AGENT_MARK}={token}\0".encode()
        self._close = close
        self._lock = threading.Lock()
        self._watched = 0
        """The round whose workers are watched."""
        self._told = False
        """The leader knows how the workers of this round ended, or has ended them itself."""

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next round. SystemExit ends torchrun when the job has finished without this node."""
        self._tell_failure(self.round, None)
        self._kill_workers()  # what those that failed have left running
        try:
            info = super().next_rendezvous()
        except JobEnded as over:
            _end(over)
        with self._lock:
            self._told = False
        return RendezvousInfo(_ExitBarrier(self._wait_for_all), info.rank, info.world_size, info.bootstrap_store_info)

    def num_nodes_waiting(self) -> int:
        """Called while all workers of this node live."""
        if self._watched != self.round:
            self._watched = self.round
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
        """The agent gives up, or all is done."""
        self._tell_failure(self.round, None)
        self._close()
        return True

    def _watch(self, round: int) -> None:
        self._control.report("running", round)
        workers = {}
        for pid in guard.marked(self._token):
            with contextlib.suppress(ProcessLookupError):  # torch's agent sees that too
                if proc.parent(pid) == os.getpid():
                    workers[os.pidfd_open(pid)] = pid, int(proc.variable(pid, "LOCAL_RANK") or 0)
        threading.Thread(target=self._look_after, args=(round, workers), name=f"workers-{round}", daemon=True).start()

    def _look_after(self, round: int, workers: dict[int, tuple[int, int]]) -> None:
        """Tell the leader at once when a worker fails, which torch's agent tells after it has stopped the others."""
        oom, watch, poll = OomWatch(), Watch(None, 0), select.poll()
        watch.start([pid for pid, _ in workers.values()], [])
        for descriptor in workers:
            poll.register(descriptor, select.POLLIN)
        left = set(workers)
        while left and not self._is_over(round):
            for descriptor, _ in poll.poll(1000):
                poll.unregister(descriptor)
                left.discard(descriptor)
                code = proc.exit_code(descriptor)
                if code and self._tell_failure(round, code, workers[descriptor][1], oom=oom.happened()):
                    _wait_until_reaped(descriptor)  # else torch could take one of those killed here for the first
                    for sibling in left:  # these alone: the next round may have begun
                        with contextlib.suppress(ProcessLookupError):
                            signal.pidfd_send_signal(sibling, signal.SIGKILL)
            if not self._is_over(round):
                watch.look()
                self._control.report_progress(watch.progress._replace(listens=False))
        for descriptor in workers:
            os.close(descriptor)

    def _is_over(self, round: int) -> bool:
        return self._told or round != self.round

    def _tell_failure(self, round: int, code: int | None, local: int = 0, *, oom: bool = False) -> bool:
        """Tell the leader that a worker of ``round`` has failed, if nobody has. None: the agent says so, not how."""
        with self._lock:
            if self._is_over(round) or not self.seat:
                return False
            self._told = True
        cause = explain(code or 1, "", oom=oom)
        message = cause.message if code else "a worker failed; see the output of torchrun"
        rank = self.plan.group_rank * self._nproc + local
        # an exit code alone does not say whether this is the echo of another rank's death
        collateral = cause.kind == "exit"
        failure = Failure(cause.kind, self._node, rank, local, code or 1, message, time.time(), collateral=collateral)
        self._control.report("failed", round, failure)
        return True

    def _kill_workers(self) -> None:
        """The workers of a broken round are stuck in a collective."""
        with self._lock:
            self._told = True
        guard.kill_all(self._token)

    def _wait_for_all(self) -> None:
        """All workers of this node have finished: wait until the job has."""
        self._kill_workers()  # what they left running
        self._control.report("succeeded", self.round)
        try:
            while not (stop := self._control.must_stop(self.round)):
                select.select([self._control.wake_fd], [], [], 1.0)
            log.info("this node's workers have finished, and it leaves the job, which goes on: %s", stop)
        except JobEnded as over:
            if over.outcome != "finished":
                log.info("%s: %s", over.outcome, over.reason)


def _end(over: JobEnded) -> NoReturn:
    log.info("%s: %s", over.outcome, over.reason)
    if over.outcome == "finished":
        raise SystemExit(0) from None
    raise RendezvousClosedError(over.reason) from None


def _wait_until_reaped(descriptor: int) -> None:
    end = time.monotonic() + 2
    while proc.exit_code(descriptor) and time.monotonic() < end:
        time.sleep(0.01)
