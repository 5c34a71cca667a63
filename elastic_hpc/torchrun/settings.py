"""The options of a job, from torchrun's options and its ``--rdzv-conf``, and this node's place in the job."""

from __future__ import annotations

import fcntl
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous import RendezvousParameters

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.network import addresses
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import LAUNCH_OPTIONS
from elastic_hpc.options.values import Endpoint, NodeRange, RdzvConf
from elastic_hpc.record.folders import is_there
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv, read_agent_env

_SHARED = ("heartbeat_timeout", "max_restarts", "interface")
_OPTIONS = {option.dest: option for option in LAUNCH_OPTIONS if option.dest in _SHARED}
_TIMEOUTS = ("join_timeout", "last_call_timeout")
_KEYS = (*_SHARED, *_TIMEOUTS, "run_dir", "node", "is_host", "nproc_per_node")
_TORCHS_TIMEOUT = "900"
"""torch adds this value itself, as the key ``timeout``."""


@dataclass(frozen=True)
class Settings:
    """The options of one torchrun, checked."""

    spec: LaunchSpec
    run_dir: Path
    node: int | None
    is_host: bool | None
    nproc: int


def read_settings(parameters: RendezvousParameters) -> Settings:
    """Raises UsageError."""
    given = {key: str(value) for key, value in parameters.config.items()}
    if given.get("timeout") == _TORCHS_TIMEOUT:
        del given["timeout"]
    for key, value in given.items():
        if key not in _KEYS:
            raise UsageError(f"--rdzv-conf {key}={value}: expected KEY=VALUE with KEY one of {', '.join(_KEYS)}")
    values = {key: _checked(key, option.parse, given[key]) for key, option in _OPTIONS.items() if key in given}
    timeouts = ",".join(f"{key}={given[key]}" for key in _TIMEOUTS if key in given)
    spec = LaunchSpec(
        script=" ".join(sys.argv),
        nodes=NodeRange(parameters.min_nodes, parameters.max_nodes),
        rdzv_endpoint=Endpoint.parse(parameters.endpoint) if parameters.endpoint else Endpoint(),
        rdzv_id=parameters.run_id,
        rdzv_conf=RdzvConf.parse(timeouts),
        grace=timedelta(seconds=1),  # no drain: torch's agent would believe drained workers to have finished
        **values,
    )
    if "/" in parameters.run_id or parameters.run_id in {"", ".", "..", "none"}:  # torchrun's default is none
        raise UsageError(
            f"--rdzv-id {parameters.run_id!r}: expected a name no other job has, for example --rdzv-id $SLURM_JOB_ID"
        )
    return Settings(
        spec=spec,
        run_dir=Path(given.get("run_dir") or Path("elastic-logs", parameters.run_id)).absolute(),
        node=_checked("node", int, given["node"]) if "node" in given else None,
        is_host=_checked("is_host", lambda _: parameters.get_as_bool("is_host"), given.get("is_host", "")),
        nproc=_checked("nproc_per_node", int, given["nproc_per_node"]) if "nproc_per_node" in given else _own_nproc(),
    )


def _checked(key: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ElasticError as error:
        raise UsageError(f"--rdzv-conf {key}={text}: {str(error).partition(': ')[2]}") from None
    except ValueError:
        expected = "true or false" if key == "is_host" else "a whole number, 0 or more"
        raise UsageError(f"--rdzv-conf {key}={text}: expected {expected}") from None


def _own_nproc() -> int:
    """How many workers torchrun will start here. torchrun does not pass this on, so this reads its command line."""
    if os.path.basename(sys.argv[0]) not in {"torchrun", "run.py"}:
        raise UsageError(
            "nproc_per_node is not known outside of torchrun: add it to rdzv_configs, for example {'nproc_per_node': 4}"
        )
    return int(torchrun.determine_local_world_size(torchrun.parse_args(sys.argv[1:]).nproc_per_node))


def _lock(path: Path) -> bool:
    """Try to lock ``path`` until this process ends; False if another process has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError as error:
        raise ElasticError(f"{path}: {error.strerror}; give each node its number: --rdzv-conf node=0") from error
    return True


def place(settings: Settings, rundir: RunDir) -> AgentEnv:
    """This node's place in the job: its index in Slurm's job step, the number given to it, or the first free number."""
    if "SLURM_STEP_NUM_NODES" in os.environ and settings.node is None:
        return read_agent_env(os.environ)
    node = settings.node
    if node is None:
        node = next(number for number in itertools.count() if _lock(rundir.path / f"node.{number}.lock"))
    name, cpus = f"{os.uname().nodename}-{node}", len(os.sched_getaffinity(0))
    job = os.environ.get("SLURM_JOB_ID") or str(settings.spec.rdzv_id)
    return AgentEnv(job, node, name, settings.spec.nodes.max, 0, cpus, None, None, local=True)


def leads_at_first(settings: Settings, env: AgentEnv, rundir: RunDir) -> bool:
    """Whether this agent leads at the beginning. As with torch's own backend, the endpoint's host leads; of several
    agents on that host, one leads. If the job runs already, the agent follows its leader.
    """
    endpoint, first = settings.spec.rdzv_endpoint, settings.is_host
    if first is None:
        first = addresses.is_me(endpoint.head, env.name) if endpoint.head else env.node == 0
    first = first and _locks_lead(rundir, has_number=settings.node is not None or not env.local)
    if not first or not is_there(rundir.path / "endpoint.json"):
        return first
    if rundir.read("verdict.json"):
        return True
    patience = 2 * settings.spec.heartbeat_timeout.total_seconds()  # as long as an agent looks for a leader
    before, end = rundir.heartbeat(), time.monotonic() + patience
    while time.monotonic() < end:
        if rundir.heartbeat() != before:
            return False
        time.sleep(0.1)
    return True


def _locks_lead(rundir: RunDir, *, has_number: bool) -> bool:
    """Whether no other agent leads at first. Without locks in the file system, a node with a number may lead."""
    try:
        return _lock(rundir.path / "host.lock")
    except ElasticError:
        if has_number:
            return True
        raise
