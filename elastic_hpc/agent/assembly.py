"""The parts of an agent that ``python -m elastic_hpc.agent`` and ``torchrun`` have in common.

torch is imported in ``connect`` at the earliest, so that standbys may import it at the same time as this process.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from elastic_hpc import __version__
from elastic_hpc.agent import promise_file
from elastic_hpc.agent.arguments import policy_of
from elastic_hpc.agent.bridge import Control
from elastic_hpc.agent.leading import CONTROL_PORT_OFFSET, Leading
from elastic_hpc.agent.log import AgentLog
from elastic_hpc.agent.threads import ThreadedReader, run_while_processes_start
from elastic_hpc.environment import AGENT_MARK, prepare_worker_env
from elastic_hpc.membership.leader import STOP_TIMEOUT
from elastic_hpc.membership.promises import ROOM, Promises
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Network
from elastic_hpc.network.identity import Identity
from elastic_hpc.network.server import LEAVE_TIMEOUT
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.workers import folder, guard

LEAVE = LEAVE_TIMEOUT + 20
"""Most seconds that an agent takes to leave when the job has ended: the leader waits that long for all others."""

_SECRET_TIMEOUT = 2.0
"""Seconds that a connection waits for the secret. The agent reads the secret from the run directory once."""


class Assembly:
    """One agent without its workers. ``connect`` follows ``__init__``, and ``close`` ends the agent."""

    leading: Leading
    control: Control

    def __init__(
        self,
        spec: LaunchSpec,
        env: AgentEnv,
        rundir: RunDir,
        nproc: int,
        environ: Mapping[str, str],
        *,
        can_requeue: bool,
        interface: str | None = None,
        keeps: bool = False,
    ) -> None:
        """Make this process an agent: ``os.environ`` becomes what the workers inherit, so no thread may run yet.

        ``environ``: the environment that this process was started with. ``interface``: what NCCL uses. ``keeps``:
        workers may connect to the agent, which then keeps their processes for the next round.
        """
        run_while_processes_start()
        folder.remember()
        self.spec, self.env, self.rundir, self.nproc, self.environ = spec, env, rundir, nproc, environ
        self.policy = policy_of(spec, nproc, can_requeue=can_requeue)
        token = f"{environ.get('SLURM_JOB_ID', '')}.{secrets.token_hex(8)}"
        self.mark = f"{AGENT_MARK}={token}\0".encode()
        """The entry that all workers of this agent, and no other process, have in their environment."""
        self.local_folder = tempfile.mkdtemp(prefix="elastic-hpc-", dir=promise_file.memory_folder())
        """Where the agent meets its workers; only its owner may use it."""
        self.live_socket = os.path.join(self.local_folder, "live") if keeps else ""
        prepare_worker_env(
            os.environ,
            env.cpus,
            nproc,
            token,
            run_dir=str(rundir.path),
            live=self.live_socket,
            interface=interface,
        )
        self._log = AgentLog(rundir, env)
        self._place = promise_file.PromisesKey(rundir.path, env.job, env.run, env.node)
        self._promise_file: promise_file.PromiseFile | None = None
        self._promises = Promises(votes=not env.joins)
        self._guard = _start_guard(token, 1.5 * self.policy.heartbeat_timeout, self.local_folder)

    def remember(self, *, again: bool) -> bool:
        """Keep the promises of this node in a file, for the next agent on the node. ``again``: the node had an agent
        before in this run. Returns whether that agent had followed or been a leader. Raises ElasticError.
        """
        if self._promise_file:
            self._promise_file.remove()
        nodes = max(self.env.nodes, self.policy.max_nodes, ROOM)
        self._promises, self._promise_file = promise_file.begin(self._place, nodes, again=again)
        return self._promises.roster is not None

    def connect(
        self,
        published: tuple[str, ...],
        *,
        first: bool,
        supplies: bool = False,
        contained: bool = False,
        unfit: Callable[[], str] = lambda: "",
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the parts that find, follow or are the leader; ``control.start`` starts them.

        ``published``: this node's addresses. ``first``: this node leads at the beginning. ``supplies``, ``contained``:
        see ``Leading``. ``unfit`` may block, and returns why this node should not take part. ``on_stuck``: see
        ``Control``.
        """
        from elastic_hpc.agent.store import StoreHost

        listeners = addresses.listen_on(_interfaces(published), self.spec.rdzv_endpoint.port + CONTROL_PORT_OFFSET)
        host = Host(self.env.node, self.env.name, published, listeners[0].getsockname()[1], _software())
        identity = Identity(str(self.spec.rdzv_id), self.env.run, host.node, host.name, secrets.token_hex(8))
        network = self._network(listeners, identity)
        self.leading = Leading(
            self.spec,
            self.env,
            host,
            self.nproc,
            self.policy,
            self.rundir,
            self.environ,
            StoreHost(self.spec.rdzv_endpoint.port, published).open,
            network.dial,
            supplies=supplies,
            contained=contained,
            job=identity.job,
        )
        if first:
            self.leading.prepare()
        self.control = Control(
            host,
            self.nproc,
            network,
            self.leading,
            self._promises,
            heartbeat_timeout=self.policy.heartbeat_timeout,
            join_timeout=self.policy.join_timeout,
            first=first,
            unfit=unfit(),
            beat=lambda: guard.beat(self._guard),
            on_stuck=on_stuck,
        )

    def _network(self, listeners: Sequence[socket.socket], identity: Identity) -> Network:
        known: list[bytes] = []
        reader = ThreadedReader(self.rundir.read_secret, _SECRET_TIMEOUT)

        async def secret() -> bytes:
            if not known:
                known.append(await reader.read())
            return known[0]

        timeout = max(0.5, self.policy.heartbeat_timeout / 5)
        named = self.environ.get("NCCL_SOCKET_IFNAME") or self.environ.get("GLOO_SOCKET_IFNAME", "")
        return Network(listeners, identity, secret, timeout, addresses.of_workers(named))

    @functools.cached_property
    def identity(self) -> str:
        """See ``RunDir.identity``. Available once a leader was found: the secret exists by then."""
        return self.rundir.identity()

    def close(self, timeout: float = LEAVE) -> None:
        """Leave the job. The leader's agent waits, at most ``timeout`` seconds, until all others have left."""
        self.control.close(timeout)
        if self._promise_file:
            self._promise_file.remove()
            promise_file.clean_up(self._place, ended=True)
        if self.leading.recorder:
            self.leading.recorder.close()
        self._log.close()


def _interfaces(published: Sequence[str]) -> list[str]:
    """The addresses on which an agent that publishes ``published`` listens: these and loopback, because an agent that
    leads dials itself, even while its interface is down. If no published address is this machine's own (a device
    between the nodes translates addresses), the agent listens on all interfaces.
    """
    own = addresses.own(published)
    return list(dict.fromkeys([*own, addresses.LOOPBACK])) if own else [""]


def _start_guard(token: str, silence: float, folder: str) -> int:
    """Start the guard. Returns the pipe on which the agent sends its beats; when the pipe closes, the guard kills."""
    theirs, ours = os.pipe()
    patience = max(STOP_TIMEOUT, 2 * silence)
    subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, token, f"{silence:g}", folder, f"{patience:g}"],
        env={name: value for name, value in os.environ.items() if name != AGENT_MARK},  # not a worker
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs)
    return ours


def _software() -> str:
    """The versions that all nodes must share."""
    import torch

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"elastic_hpc {__version__}, torch {torch.__version__}, Python {python}"
