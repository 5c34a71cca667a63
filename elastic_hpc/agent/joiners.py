"""Joiners from both sides: how an agent enters a running job, and how Slurm brings an agent for a leader."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from elastic_hpc import slurm
from elastic_hpc.agent.threads import on_thread
from elastic_hpc.environment import AGAIN, JOIN
from elastic_hpc.errors import ElasticError, JobEnded, SlurmError
from elastic_hpc.membership.messages import ProtocolError
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Link, knock
from elastic_hpc.network.identity import AnotherNode, RunIsOver
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.workers import folder

_PROBE = 0.5
"""Seconds in which a node that has power answers a connection attempt."""

_MOST_STARTING = 16
"""Maximum number of agents that are started at the same time. Each costs slurmctld two requests and a job step."""


def enter(env: AgentEnv, rundir: RunDir) -> AgentEnv:
    """The ``env`` of a joiner, changed to that of the job that it joins. Raises JobEnded if that job has ended, or
    waits in the queue.
    """
    spec, endpoint = rundir.read("spec.json"), rundir.read("endpoint.json")
    if not spec or not endpoint:
        raise ElasticError(f"{rundir.path}: no job has been started there that could be joined")
    verdict = rundir.read("verdict.json")
    if verdict and verdict["run"] >= endpoint["run"]:
        raise JobEnded("lost", f"the job has ended: {verdict['reason']}")
    with contextlib.suppress(SlurmError):  # without an answer from Slurm, the agent looks for the leader
        if (state := slurm.job_state(spec["job"], endpoint["run"])) != "RUNNING":
            raise JobEnded("lost", f"job {spec['job']} is {state}")
    return replace(env, job=spec["job"], run=endpoint["run"])


async def _answers(address: str, port: int) -> bool | None:
    """Whether a process listens on ``port``; None if the node does not answer."""
    try:
        await knock(address, port, _PROBE)
    except ConnectionRefusedError:
        return False
    except (OSError, asyncio.TimeoutError):
        return None
    return True


class SlurmSource:
    """The ``supply.Source`` of a job under Slurm. Its commands run on threads, so that none can delay the leader."""

    def __init__(
        self,
        env: AgentEnv,
        rundir: RunDir,
        environ: Mapping[str, str],
        dial: Callable[[Host], Awaitable[Link]],
    ) -> None:
        """``environ``: the environment that this agent was started with, as prepared by the batch script. ``dial``: see
        ``network.node.Transport``.
        """
        self._env = env
        self._dial = dial
        self._rundir = rundir
        self._environ = environ
        self._starting = asyncio.Semaphore(_MOST_STARTING)

    async def lacks_agent(self, host: Host) -> bool:
        """A node without power does not answer. On a node with a frozen agent, the kernel accepts the connection."""
        here = {address for address in addresses.own(host.addresses) if not address.startswith("127.")}
        others = [address for address in host.addresses if address not in here]
        found = await asyncio.gather(*(self._has_agent(replace(host, addresses=(address,))) for address in others))
        return False in found and True not in found

    async def _has_agent(self, host: Host) -> bool | None:
        """Whether ``host``, at its only address, has its agent; None if another node answers, or no node does."""
        answers = await _answers(host.addresses[0], host.port)
        if not answers:
            return answers
        try:
            link = await self._dial(host)
        except AnotherNode:
            return None
        except (asyncio.TimeoutError, TimeoutError, ElasticError, RunIsOver):  # it may be frozen
            return True
        except (OSError, ProtocolError):  # another process has taken the port of the dead agent
            return False
        link.close()
        return True

    async def restart(self, host: Host) -> bool:
        async with self._starting:
            return await on_thread(self._restart, host)

    async def starting(self) -> Mapping[str, str]:
        return await on_thread(slurm.agent_steps, self._environ["SLURM_JOB_ID"])

    async def joiners(self) -> Sequence[slurm.Joiner]:
        return await on_thread(slurm.joiners, self._env.job)

    async def remaining(self) -> float:
        left = (await on_thread(slurm.show_job, self._env.job)).remaining
        return float("inf") if left is None else left.total_seconds()

    async def shorten(self, ids: Collection[str], seconds: float) -> None:
        for id in ids:
            await on_thread(slurm.change_time_limit, id, timedelta(seconds=seconds))

    async def submit(self, exclude: Collection[str]) -> str:
        return await on_thread(self._submit, exclude)

    async def cancel(self, ids: Collection[str]) -> None:
        await on_thread(slurm.cancel, *ids)

    async def give_back(self, names: Collection[str]) -> None:
        await on_thread(slurm.give_back, self._env.job, names)

    def _restart(self, host: Host) -> bool:
        if host.name not in slurm.expand(slurm.show_job(self._env.job).nodes):
            return False
        command = [sys.executable, *sys.orig_argv[1:]]
        log = self._rundir.path / "logs" / f"{self._env.run}.again-{host.name}.log"
        cpus = self._environ.get("SLURM_CPUS_PER_TASK")
        environ = {**self._environ, AGAIN: str(host.node)}
        folder.renew()
        slurm.start_agent(self._environ["SLURM_JOB_ID"], host.name, command, environ, log, cpus)
        return True

    def _submit(self, exclude: Collection[str]) -> str:
        script = self._rundir.path / "script.sbatch"
        try:
            body = script.read_bytes()
        except OSError as error:
            raise ElasticError(f"{script}: {error.strerror}") from error
        if JOIN.encode() not in body:
            raise ElasticError(f"{script}: expected a script that knows {JOIN}, as the built-in template does")
        folder.renew()
        submitted = slurm.submit_joiner(
            self._env.job,
            body,
            environ=self._environ,
            run_dir=self._rundir.path,
            log=self._rundir.path / "logs" / f"{self._env.run}.join-%j.log",
            exclude=exclude,
        )
        if submitted is None:
            raise ElasticError("the job's time is up")
        return submitted
