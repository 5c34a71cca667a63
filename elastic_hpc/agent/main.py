"""One node's agent: ``python -m elastic_hpc.agent [options] --run-dir DIR -- SCRIPT ARGS``, one per node by srun."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import logging.handlers
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_hpc.agent import preflight
from elastic_hpc.agent.bridge import Control
from elastic_hpc.agent.joiners import enter
from elastic_hpc.agent.leading import Leading
from elastic_hpc.environment import AGENT_MARK, forget_enclosing, prepare_worker_env
from elastic_hpc.errors import JobEnded, UsageError
from elastic_hpc.membership.policy import Policy
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Network
from elastic_hpc.network.server import LEAVE_TIMEOUT
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import add_launch_options
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv, read_agent_env, visible_gpus, workers_per_node
from elastic_hpc.workers import guard
from elastic_hpc.workers.drain import DrainSignals
from elastic_hpc.workers.standbys import Standbys

log = logging.getLogger("elastic_hpc")

EXIT_CODES = {"finished": 0, "failed": 1, "requeue": 0, "lost": 1}
"""Exit code of an agent by outcome; a hint only, the verdict is in the run directory."""

CONTROL_PORT_OFFSET = 32
"""Control port above the endpoint's: the 32 below are for the stores of the rounds."""


def parse_args(argv: list[str] | None = None) -> tuple[LaunchSpec, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m elastic_hpc.agent",
        description="Run one node's workers of an elastic job. Started once per node by elastic-sbatch's script or by "
        "elastic-srun; by hand: srun --ntasks-per-node=1 python -m elastic_hpc.agent ... -- train.py",
    )
    add_launch_options(parser)
    parser.add_argument("--run-dir", required=True, help="the job's folder on a file system that all nodes share")
    parser.add_argument(
        "--no-requeue", action="store_true", help="nobody acts on a requeue verdict: end the job instead"
    )
    parser.add_argument(
        "--contained", action="store_true", help="this is a container: Slurm's commands outside are not for this agent"
    )
    parser.add_argument("script", help="the training script, or with -m the module")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    return LaunchSpec.from_namespace(args), args


def start_log(rundir: RunDir, env: AgentEnv) -> logging.handlers.QueueListener:
    """To stderr, and to a file, because srun may be lost with the first node. Records go through a queue: the control
    thread must not wait for a stalled stderr or file system.
    """
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    try:
        folder = rundir.path / "logs"
        folder.mkdir(mode=0o700, exist_ok=True)
        handlers.append(logging.FileHandler(folder / f"{env.run}.agent-{env.name}.log"))
    except OSError as error:
        print(f"elastic_hpc[{env.name}]: no log file: {error}", file=sys.stderr)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s elastic_hpc[{env.name}]: %(message)s", "%H:%M:%S"))
    listener = logging.handlers.QueueListener(records, *handlers)
    listener.start()
    log.addHandler(logging.handlers.QueueHandler(records))
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a full file system is told once, by the recorder
    return listener


def new_mark(environ: Mapping[str, str]) -> str:
    """For ``AGENT_MARK``, of no other agent."""
    return f"{environ.get('SLURM_JOB_ID', '')}.{secrets.token_hex(8)}"


def run_id(spec: LaunchSpec, env: AgentEnv, rundir: RunDir) -> str:
    """What workers see as TORCHELASTIC_RUN_ID: a joiner's, too, have that of the job that it joins."""
    joined = (rundir.read("spec.json") or {}).get("--rdzv-id") if env.joins else None
    return spec.rdzv_id or joined or env.run_id or env.job


def start_guard(token: str, silence: float, folder: str) -> int:
    """Start the guard; the answer is the pipe on which it is kept quiet, and whose closing sets it off."""
    theirs, ours = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, token, f"{silence:g}", folder],
        env={name: value for name, value in os.environ.items() if name != AGENT_MARK},  # it is no worker
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs)
    return ours


def policy_of(spec: LaunchSpec, nproc: int, *, can_requeue: bool) -> Policy:
    sizes = spec.sizes(nproc)
    return Policy(
        min_nodes=sizes[0],
        max_nodes=sizes[-1],
        sizes=sizes,
        spares=spec.spares,
        grow=spec.grow,
        free_growth=spec.free_growth,
        grow_every=spec.grow_every.total_seconds(),
        wait_for_nodes=spec.wait_for_nodes.total_seconds(),
        max_restarts=spec.max_restarts,
        max_requeues=spec.max_requeues,
        heartbeat_timeout=spec.heartbeat_timeout.total_seconds(),
        join_timeout=spec.rdzv_conf.join_timeout.total_seconds(),
        last_call_timeout=spec.rdzv_conf.last_call_timeout.total_seconds(),
        grace=spec.grace.total_seconds(),
        can_requeue=can_requeue,
    )


def _preflight(spec: LaunchSpec, env: AgentEnv, rundir: RunDir, environ: Mapping[str, str], unfit: list[str]) -> None:
    """Add to ``unfit`` why this node should not take part, if so."""
    problems = preflight.check(
        rundir.path,
        gpus=env.gpus,
        cuda_visible=environ.get("CUDA_VISIBLE_DEVICES"),
        command=spec.preflight,
        environ=environ,
    )
    for problem in problems:
        log.warning("preflight: %s", problem.what)
        if problem.fatal:
            unfit.append(problem.what)


def python_of_worker(own_argv: Sequence[str]) -> list[str]:
    """A worker's interpreter with its options. ``own_argv``: how this process was started: what stands there before
    the last ``-u`` are the options of --python.
    """
    before = list(itertools.takewhile(lambda word: word not in {"-m", "-c"}, own_argv[1:]))
    last = max((at for at, word in enumerate(before) if word == "-u"), default=0)
    return [sys.executable, *before[:last], "-u"]


def what_to_preload(spec: LaunchSpec) -> tuple[tuple[str, ...], str]:
    """The modules that standbys import, and why there are no standbys, if there are none."""
    for option, rules_it_out in (("--no-python", spec.no_python), ("--numa-binding", spec.numa_binding)):
        if rules_it_out:
            return (), option
    return spec.preload.modules, "--preload off"


def numa_options(mode: str | None) -> dict[str, Any]:
    """What torch's agent is told of --numa-binding. UsageError where it would fail when the workers start."""
    if mode is None:
        return {}
    import torch

    try:
        from torch.numa.binding import AffinityMode, NumaOptions

        told = {"numa_options": NumaOptions(AffinityMode(mode))}
    except (ImportError, ValueError):
        raise UsageError(f"--numa-binding {mode}: this torch has no such binding; leave it out") from None
    if not torch.cuda.is_available():
        raise UsageError(f"--numa-binding {mode}: binds workers to the cores near their GPU, and here is none")
    if shutil.which("numactl") is None:
        raise UsageError(f"--numa-binding {mode}: expected numactl on the node's PATH, and there is none")
    return told


def make_local_folder() -> str:
    """Where the agent meets its workers: in memory if possible, for its owner only."""
    shared = "/dev/shm"  # noqa: S108 - a folder of our own, mode 0700, is made in it
    return tempfile.mkdtemp(prefix="elastic-hpc-", dir=shared if os.access(shared, os.W_OK) else None)


def software() -> str:
    """What all nodes must have the same of."""
    import torch

    return f"torch {torch.__version__}, Python {sys.version_info.major}.{sys.version_info.minor}"


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
    name = run_id(spec, env, rundir)
    spec = replace(spec, rdzv_id=name)
    token = new_mark(os.environ)
    nproc, numa = workers_per_node(spec.nproc_per_node, env, visible_gpus), numa_options(spec.numa_binding)
    policy = policy_of(spec, nproc, can_requeue=not (args.no_requeue or env.local))
    prepare_worker_env(os.environ, env.cpus, nproc, token, run_dir=str(rundir.path), interface=spec.interface)

    listener = start_log(rundir, env)
    local_folder = make_local_folder()
    pipe = start_guard(token, 1.5 * spec.heartbeat_timeout.total_seconds(), local_folder)
    unfit: list[str] = []
    checking = threading.Thread(target=_preflight, args=(spec, env, rundir, environ, unfit))
    checking.start()
    python = python_of_worker(sys.orig_argv)
    script = f"./{spec.script}" if spec.script.startswith("-") else spec.script  # no option of python's
    worker_args = [*(["-m", spec.script] if spec.module else [script]), *spec.script_args]
    worker = [spec.script, *spec.script_args] if spec.no_python else [*python, *worker_args]
    modules, without = what_to_preload(spec)
    standbys = Standbys(worker_args, modules, nproc, python, without)
    standbys.prepare()  # they import while this process does

    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException

    from elastic_hpc.agent.rendezvous import ElasticRendezvousHandler
    from elastic_hpc.workers.elastic_agent import ElasticAgent, NodeLogs

    server_socket = addresses.listen_from(spec.rdzv_endpoint.port + CONTROL_PORT_OFFSET)
    published = ("127.0.0.1",) if env.local else addresses.to_publish(env.name, spec.interface, env.submit_host)
    me = Host(env.node, env.name, published, server_socket.getsockname()[1], software())
    contained = not env.local and (args.contained or shutil.which("scontrol") is None)
    leading = Leading(spec, env, me, nproc, policy, rundir, environ, contained=contained)
    head = spec.rdzv_endpoint.head
    first = not env.late and (addresses.is_me(head, env.name) if head and not env.local else env.node == 0)
    if first:
        leading.prepare()
    checking.join()
    control = Control(
        me,
        nproc,
        lambda: network(server_socket, rundir, policy),
        leading,
        heartbeat_timeout=policy.heartbeat_timeout,
        join_timeout=policy.join_timeout,
        first=first,
        unfit="; ".join(unfit),
        beat=lambda: guard.beat(pipe),
    )
    handler = ElasticRendezvousHandler(control, name, environ.get("GLOO_SOCKET_IFNAME"), local_folder)
    worker_spec = WorkerSpec(
        role=spec.role or "default",
        local_world_size=nproc,
        rdzv_handler=handler,
        max_restarts=spec.max_restarts,
        monitor_interval=0.001,  # the waiting is done on events in ElasticAgent
        entrypoint=worker[0],
        # torch expands $-macros in these; the arguments are the script's, byte for byte
        args=tuple(arg.replace("$", "$$") for arg in worker[1:]),
        **numa,
    )
    mark = f"{AGENT_MARK}={token}\0".encode()
    logs = NodeLogs(Path(rundir.path, "logs"), env.run, env.name, spec.local_ranks_filter)
    signals = DrainSignals(spec.drain_signal, slurm=not env.local)
    agent = ElasticAgent(worker_spec, logs, control, mark, env.name, policy, spec.hang_timeout, standbys, signals)

    agent.handle_signals()
    # Slurm's warning comes as a request over the control connection. Not SIG_IGN: the workers would inherit that.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    leads = False
    try:
        control.start()
        agent.run()
        raise AssertionError("torch's agent returned; only the leader ends a job")
    except JobEnded as ended:
        leads = leading.recorder is not None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it to its own caller, who has more to do
        if not leads or ended.outcome == "lost":
            log.info("%s: %s", "leaving" if env.joins else ended.outcome, ended.reason)
        code, leave = 0 if env.joins else EXIT_CODES[ended.outcome], LEAVE_TIMEOUT + 20
    except SignalException as error:
        log.info("%s: leaving", error)
        code, leave = 128 + error.sigval, 0.5
    standbys.close()
    control.close(timeout=leave)
    if leading.recorder:
        leading.recorder.close()
    listener.stop()
    return code


def network(listener: socket.socket, rundir: RunDir, policy: Policy) -> Network:
    known: list[bytes] = []

    async def secret() -> bytes:
        if not known:
            known.append(await asyncio.to_thread(rundir.read_secret))
        return known[0]

    return Network(listener, secret, max(0.5, policy.heartbeat_timeout / 5))
