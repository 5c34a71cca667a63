"""The command line of an agent, and what follows from it: the policy, the number of workers and their command."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.membership.policy import Policy
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import add_launch_options
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices of the drivers of NVIDIA, AMD and Windows: torch finds no GPU where all three are missing."""


def parse_args(argv: list[str] | None = None) -> tuple[LaunchSpec, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m elastic_hpc.agent",
        description="Run one node's workers of an elastic job. Started once per node by elastic-sbatch's script or by "
        "elastic-srun; by hand: srun --ntasks-per-node=1 python -m elastic_hpc.agent ... -- train.py",
    )
    add_launch_options(parser)
    parser.add_argument(
        "--run-dir", required=True, help="run directory of the job, on a file system that all nodes share"
    )
    parser.add_argument("--no-requeue", action="store_true", help="end the job instead of requeueing it")
    parser.add_argument(
        "--contained", action="store_true", help="this agent runs in a container, without Slurm's commands"
    )
    parser.add_argument("script", help="the training script, or with -m the module")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, help="the script's own arguments")
    args = parser.parse_args(argv)
    return LaunchSpec.from_namespace(args), args


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
        learns_hangs=spec.hang_timeout.learns,
        slow_factor=spec.slow_node.factor,
        leaves_slow=spec.slow_node.leaves,
    )


def run_id(spec: LaunchSpec, env: AgentEnv, rundir: RunDir) -> str:
    """What workers see as TORCHELASTIC_RUN_ID. The workers of a joiner have the id of the job that it joins."""
    joined = (rundir.read("spec.json") or {}).get("--rdzv-id") if env.joins else None
    return spec.rdzv_id or joined or env.run_id or env.job


def workers_per_node(wanted: str | None, env: AgentEnv, visible_gpus: Callable[[], int]) -> int:
    """Number of workers for ``--nproc-per-node``. ``visible_gpus`` counts GPUs when Slurm does not say how many it
    granted. Raises ElasticError for ``gpu`` on a node without GPUs.
    """
    if wanted == "cpu":
        return env.cpus
    if wanted and wanted.isdecimal():
        return int(wanted)
    gpus = env.gpus if env.gpus is not None else visible_gpus()
    if wanted is None:
        return gpus or 1
    if wanted == "auto":
        return gpus or env.cpus
    if not gpus:
        raise ElasticError(
            f"--nproc-per-node gpu: {env.name} has no GPU granted; request GPUs, "
            "for example --gpus-per-node=4, or use --nproc-per-node cpu"
        )
    return gpus


def visible_gpus() -> int:
    """The number of GPUs as torch counts them; torch is imported only where there may be one."""
    if not any(map(os.path.exists, _GPU_DRIVERS)):
        return 0
    import torch

    return int(torch.cuda.device_count())


def worker_args(spec: LaunchSpec) -> list[str]:
    """The arguments of a worker's interpreter: the script, or ``-m`` and the module, and the script's arguments."""
    script = f"./{spec.script}" if spec.script.startswith("-") else spec.script  # so that it is no option of Python
    return [*(["-m", spec.script] if spec.module else [script]), *spec.script_args]


def worker_python(own_argv: Sequence[str]) -> list[str]:
    """A worker's interpreter with its options. ``own_argv``: the command line of this process, in which the words
    before the last ``-u`` are the options of --python.
    """
    before = list(itertools.takewhile(lambda word: word not in {"-m", "-c"}, own_argv[1:]))
    last = max((at for at, word in enumerate(before) if word == "-u"), default=0)
    return [sys.executable, *before[:last], "-u"]


def what_to_preload(spec: LaunchSpec) -> tuple[tuple[str, ...], str]:
    """The modules that standbys import, and the reason for no standbys if there are no modules."""
    for option, rules_it_out in (("--no-python", spec.no_python), ("--numa-binding", spec.numa_binding)):
        if rules_it_out:
            return (), option
    return spec.preload.modules, "--preload off"


def numa_options(mode: str | None) -> dict[str, Any]:
    """The part of torch's WorkerSpec for --numa-binding. Raises UsageError if the workers could not start with it."""
    if mode is None:
        return {}
    import torch

    try:
        from torch.numa.binding import AffinityMode, NumaOptions

        options = {"numa_options": NumaOptions(AffinityMode(mode))}
    except (ImportError, ValueError):
        raise UsageError(f"--numa-binding {mode}: this torch has no such binding; leave it out") from None
    if not torch.cuda.is_available():
        raise UsageError(f"--numa-binding {mode}: binds workers to the cores near their GPU, and here is none")
    if shutil.which("numactl") is None:
        raise UsageError(f"--numa-binding {mode}: expected numactl on the node's PATH, and there is none")
    return options
