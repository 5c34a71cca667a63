"""One node's agent: ``python -m elastic_hpc.agent [options] --run-dir DIR -- SCRIPT ARGS``, one per node by srun."""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import os
import queue
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from elastic_hpc import guard, net
from elastic_hpc.conclude import requeue_without_leader
from elastic_hpc.control import Control, LeaderAddress
from elastic_hpc.decide import Policy
from elastic_hpc.env import AgentEnv, prepare_worker_env, read_agent_env, workers_per_node
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.leader import Leader
from elastic_hpc.protocol import Status
from elastic_hpc.recorder import Recorder
from elastic_hpc.rundir import RunDir
from elastic_hpc.server import LEAVE_TIMEOUT, LeaderServer
from elastic_hpc.spec import LaunchSpec, add_launch_options

log = logging.getLogger("elastic_hpc")

EXIT_CODES = {"finished": 0, "failed": 1, "requeue": 0, "lost": 1}
"""Exit code of an agent by outcome; a hint only, the verdict is in the run directory."""

_CONTROL_PORT_OFFSET = 32
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
    parser.add_argument("script", help="the training script, or with -m the module")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    return LaunchSpec.from_namespace(args), args


def _log_to_stderr(node: str) -> logging.handlers.QueueListener:
    """Log records go through a queue: the control thread must not wait for a stalled stderr."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s elastic_hpc[{node}]: %(message)s", "%H:%M:%S"))
    listener = logging.handlers.QueueListener(records, handler)
    listener.start()
    log.addHandler(logging.handlers.QueueHandler(records))
    log.setLevel(logging.INFO)
    log.propagate = False
    return listener


def _start_guard(token: str) -> int:
    """Start the guard; the answer is the pipe's end whose closing sets it off."""
    theirs, ours = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, token],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs)
    return ours


def _policy(spec: LaunchSpec, *, can_requeue: bool) -> Policy:
    return Policy(
        min_nodes=spec.nodes.min,
        max_nodes=spec.nodes.max,
        max_restarts=spec.max_restarts,
        max_requeues=spec.max_requeues,
        heartbeat_timeout=spec.heartbeat_timeout.total_seconds(),
        join_timeout=spec.rdzv_conf.join_timeout.total_seconds(),
        last_call_timeout=spec.rdzv_conf.last_call_timeout.total_seconds(),
        can_requeue=can_requeue,
    )


def _make_leader(
    spec: LaunchSpec, env: AgentEnv, rundir: RunDir, nproc: int, policy: Policy, recorder: Recorder
) -> LeaderServer:
    """Bind, publish, and be ready to serve."""
    from elastic_hpc.store import StoreHost

    addresses = ("127.0.0.1",) if env.local else net.addresses_to_publish(env.name, spec.interface, env.submit_host)
    listener = net.listen_from(spec.rdzv_endpoint.port + _CONTROL_PORT_OFFSET)
    secret = rundir.make_secret()
    state = rundir.read("state.json") or {}
    rundir.write(
        "spec.json",
        {
            **{f: str(v) for f, v in spec.options()},
            "script": spec.script,
            "script_args": spec.script_args,
            "module": spec.module,
            "job": env.job,
        },
    )
    rundir.write(
        "endpoint.json",
        {
            "run": env.run,
            "host": env.name,
            "addresses": addresses,
            "port": listener.getsockname()[1],
            "rdzv_port": spec.rdzv_endpoint.port,
        },
    )
    recorder.event(
        "start", {"run": env.run, "job": env.job, "granted": env.nodes, "nproc_per_node": nproc, **asdict(policy)}
    )
    leader = Leader(
        policy,
        granted=env.nodes,
        nproc=nproc,
        now=time.monotonic(),
        round=state.get("round", 0),
        restarts=state.get("restarts", 0),
        requeues=state.get("requeues", 0),
    )
    return LeaderServer(leader, listener, secret, recorder, StoreHost(spec.rdzv_endpoint.port).open)


def _find_leader(rundir: RunDir, run: int) -> LeaderAddress | None:
    found = rundir.read("endpoint.json")
    if not found or found.get("run") != run:
        return None
    return LeaderAddress(tuple(found["addresses"]), found["port"])


def main(argv: list[str] | None = None) -> int:
    spec, args = parse_args(argv)
    env = read_agent_env(os.environ)
    listener = _log_to_stderr(env.name)
    rundir = RunDir(args.run_dir).create()
    token = secrets.token_hex(8)
    _start_guard(token)

    import torch  # late: a refusal above must not wait for it
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import SignalException

    from elastic_hpc.rendezvous import ElasticRendezvousHandler
    from elastic_hpc.workers import ElasticAgent, NodeLogs

    nproc = workers_per_node(spec.nproc_per_node, env, torch.cuda.device_count())
    gloo_interface = os.environ.get("GLOO_SOCKET_IFNAME")
    prepare_worker_env(os.environ, env, nproc, token)
    os.environ["ELASTIC_HPC_RUN_DIR"] = str(rundir.path)
    if spec.interface:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", spec.interface)

    lead = recorder = None
    policy = _policy(spec, can_requeue=not (args.no_requeue or env.local))
    host = spec.rdzv_endpoint.host
    if net.is_me(host, env.name) if host and not env.local else env.node == 0:
        recorder = Recorder(rundir, env.run)
        lead = _make_leader(spec, env, rundir, nproc, policy, recorder).run
    control = Control(
        Status(0, env.node, env.name, nproc),
        rundir.read_secret,
        lambda: _find_leader(rundir, env.run),
        heartbeat_timeout=policy.heartbeat_timeout,
        join_timeout=policy.join_timeout,
        lead=lead,
    )

    def terminated(signum: int, _frame: FrameType | None) -> None:
        raise SignalException(f"got {signal.Signals(signum).name}", signal.Signals(signum))

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, terminated)
    # Slurm's warning comes as a request over the control connection. Not SIG_IGN: the workers would inherit that.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        control.start()
        handler = ElasticRendezvousHandler(control, spec.rdzv_id or env.job, gloo_interface)
        worker_spec = WorkerSpec(
            role="default",
            local_world_size=nproc,
            rdzv_handler=handler,
            max_restarts=spec.max_restarts,
            monitor_interval=0.001,  # the waiting is done on events in ElasticAgent
            entrypoint=sys.executable,
            # torch expands $-macros in these; the arguments are the script's, byte for byte
            args=(
                "-u",
                *(["-m"] if spec.module else []),
                *(a.replace("$", "$$") for a in (spec.script, *spec.script_args)),
            ),
        )
        ElasticAgent(worker_spec, NodeLogs(Path(rundir.path, "logs"), env.run, env.name), control, env.name).run()
        raise AssertionError("torch's agent returned; only the leader ends a job")
    except JobEnded as ended:
        if not lead or ended.outcome == "lost":
            log.info("%s: %s", ended.outcome, ended.reason)
        code = EXIT_CODES[ended.outcome]
        leave = LEAVE_TIMEOUT + 5
        if ended.outcome == "lost" and handler.seat and policy.can_requeue:
            requeue_without_leader(rundir, env, handler.seat.round, policy)
    except SignalException as error:
        log.info("%s: leaving", error)
        code, leave = 128 + error.sigval, 0.5
    control.close(timeout=leave)
    if recorder:
        recorder.close()
    listener.stop()
    return code


if __name__ == "__main__":
    try:
        status = main()
    except (ElasticError, OSError) as error:
        print(f"elastic_hpc.agent: {error}", file=sys.stderr)
        status = getattr(error, "exit_code", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads that wait for a dead store or file system must not keep the node
