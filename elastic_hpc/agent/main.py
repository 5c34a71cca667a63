"""One node's agent: ``python -m elastic_hpc.agent [options] --run-dir DIR -- SCRIPT ARGS``, one per node by srun."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_hpc.agent import last_words, preflight
from elastic_hpc.agent.arguments import (
    numa_options,
    parse_args,
    run_id,
    visible_gpus,
    what_to_preload,
    worker_args,
    worker_python,
    workers_per_node,
)
from elastic_hpc.agent.assembly import LEAVE, Assembly
from elastic_hpc.agent.first import leads_at_first
from elastic_hpc.agent.joiners import enter
from elastic_hpc.agent.threads import start, within
from elastic_hpc.environment import forget_enclosing
from elastic_hpc.errors import JobEnded
from elastic_hpc.membership.leader import STOP_TIMEOUT
from elastic_hpc.membership.nodes import BATCH_HOST
from elastic_hpc.network import addresses
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import read_agent_env, spent
from elastic_hpc.workers.drain import DrainSignals
from elastic_hpc.workers.standbys import Standbys

if TYPE_CHECKING:
    from elastic_hpc.workers.elastic_agent import ElasticAgent

log = logging.getLogger("elastic_hpc")

_STRIKE_TIMEOUT = 1.0

_LAST = 5.0
"""Seconds that an agent has to leave, in addition to the seconds in which it waits for others."""

EXIT_CODES = {"finished": 0, "failed": 1, "requeue": 0, "lost": 1}
"""Exit code of an agent by outcome; a hint only, the verdict is in the run directory."""


def main(argv: list[str] | None = None) -> int:
    spec, args = parse_args(argv)
    forget_enclosing(os.environ)
    environ, env = dict(os.environ), read_agent_env(os.environ)
    rundir = RunDir(args.run_dir).create()
    if env.joins:
        try:
            env = enter(env, rundir)
        except JobEnded as over:
            print(f"elastic_hpc[{env.name}]: {over.reason}: nothing to join", file=sys.stderr)
            return 0
    restarts, requeues = spent(environ)
    spec = replace(
        spec,
        rdzv_id=run_id(spec, env, rundir),
        max_restarts=spec.max_restarts + restarts,
        max_requeues=spec.max_requeues + requeues,
    )
    nproc, numa = workers_per_node(spec.nproc_per_node, env, visible_gpus), numa_options(spec.numa_binding)
    can_requeue = not (args.no_requeue or env.local)
    parts = Assembly(spec, env, rundir, nproc, environ, can_requeue=can_requeue, interface=spec.interface, keeps=True)
    unfit = start(_check, parts).result
    modules, without = what_to_preload(spec)
    standbys = Standbys(
        worker_args(spec), modules, nproc, worker_python(sys.orig_argv), without, learns=spec.preload.learns
    )
    standbys.prepare()  # they import torch at the same time as this process
    from elastic_hpc.workers import elastic_agent  # noqa: F401 - imports torch, while the preflight runs

    contained = not env.local and (args.contained or shutil.which("scontrol") is None)
    supplies = not (env.local or contained)
    if supplies and not env.joins:  # in all other cases no agent is ever restarted
        parts.remember(again=env.late)
    parts.connect(
        ("127.0.0.1",) if env.local else addresses.to_publish(env.name, spec.interface, env.submit_host),
        first=leads_at_first(spec.rdzv_endpoint, env, rundir, environ),
        supplies=supplies,
        contained=contained,
        unfit=unfit,
        on_stuck=lambda: _exit(1, f"this agent has not carried out an order of the leader within {STOP_TIMEOUT:g} s"),
    )
    return _run(parts, _agent(parts, standbys, numa), standbys)


def _check(parts: Assembly) -> str:
    """Check this node. Returns why it should not take part; empty if it should."""
    problems = preflight.check(
        parts.rundir.path,
        gpus=parts.env.gpus,
        cuda_visible=parts.environ.get("CUDA_VISIBLE_DEVICES"),
        command=parts.spec.preflight,
        environ=parts.environ,
    )
    for problem in problems:
        log.warning("preflight: %s", problem.what)
    return "; ".join(problem.what for problem in problems if problem.fatal)


def _agent(parts: Assembly, standbys: Standbys, numa: dict[str, Any]) -> ElasticAgent:
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from elastic_hpc.agent.rendezvous import ElasticRendezvousHandler
    from elastic_hpc.workers.ahead import Ahead
    from elastic_hpc.workers.elastic_agent import ElasticAgent
    from elastic_hpc.workers.lives import Lives
    from elastic_hpc.workers.logs import NodeLogs

    lives = Lives(parts.live_socket)
    spec, env = parts.spec, parts.env
    if spec.no_python:
        command = [spec.script, *spec.script_args]
    else:
        command = [*worker_python(sys.orig_argv), *worker_args(spec)]
    worker_spec = WorkerSpec(
        role=spec.role or "default",
        local_world_size=parts.nproc,
        rdzv_handler=ElasticRendezvousHandler(parts, Ahead(lives, standbys, command, parts.nproc)),
        max_restarts=spec.max_restarts,
        monitor_interval=0.001,  # the waiting is done on events in ElasticAgent
        entrypoint=command[0],
        # torch expands $-macros in these; the arguments are the script's, byte for byte
        args=tuple(arg.replace("$", "$$") for arg in command[1:]),
        **numa,
    )
    logs = NodeLogs(Path(parts.rundir.path, "logs"), env.run, env.name, spec.tee, spec.local_ranks_filter)
    signals = DrainSignals(spec.drain_signal, slurm=not env.local)
    return ElasticAgent(
        worker_spec,
        logs,
        parts.control,
        parts.mark,
        env.name,
        parts.policy,
        spec.hang_timeout.limit,
        standbys,
        lives,
        signals,
        strike=lambda why: _strike(parts, why),
    )


def _strike(parts: Assembly, why: str) -> None:
    """Record why a requeue should avoid this node. Gives up soon: the reason may be a file system that stalls."""
    within(_STRIKE_TIMEOUT, lambda: parts.rundir.write_unfit(parts.env.name, time.time(), why))


def _run(parts: Assembly, agent: ElasticAgent, standbys: Standbys) -> int:
    """Run the workers until the leader ends the job, or a signal ends this agent. Returns the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException

    agent.handle_signals()
    # Slurm's warning comes as a request over the control connection. Not SIG_IGN: the workers would inherit that.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        parts.control.start()
        agent.run()
        raise AssertionError("torch's agent returned; only the leader ends a job")
    except JobEnded as ended:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it to its own caller too
        joins = parts.env.joins
        if not ended.logged:
            log.info("%s: %s", "leaving" if joins else ended.outcome, ended.reason)
        code, leave = 0 if joins else EXIT_CODES[ended.outcome], LEAVE
        if parts.env.node == BATCH_HOST and not parts.env.local and ended.outcome != "lost":
            last_words.leave(parts.env.job, parts.env.run, ended.outcome, ended.reason)
    except SignalException as error:
        log.info("%s: leaving", error)
        code, leave = 128 + error.sigval, 0.5
    timer = threading.Timer(leave + _LAST, _exit, [code, f"this agent has not left within {leave + _LAST:g} s"])
    timer.daemon = True
    timer.start()
    standbys.close()
    parts.close(leave)
    return code


def _exit(code: int, why: str) -> None:
    """End this process, even if a thread blocks; the guard kills its workers."""
    with contextlib.suppress(OSError):
        os.write(2, f"elastic_hpc: {why}: it exits; a GPU or a file system may not answer\n".encode())
    os._exit(code)
