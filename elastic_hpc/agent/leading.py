"""What an agent needs besides its connections to lead, or to end the job when nobody leads: record, stores, Slurm."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic_hpc import __version__, slurm
from elastic_hpc.agent import conclude
from elastic_hpc.agent.joiners import SlurmSource
from elastic_hpc.agent.supply import Supply
from elastic_hpc.errors import ElasticError, JobEnded, SlurmError
from elastic_hpc.membership.leader import Leader, Verdict
from elastic_hpc.membership.policy import Action, Policy
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.rules import requeue_or_fail
from elastic_hpc.network import addresses
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv

log = logging.getLogger(__name__)

JOINER_PATIENCE = 30.0
"""Seconds that a joiner looks for a leader at least."""


@dataclass
class Leading:
    """One agent's side of it. ``give_up`` and ``find_leader`` may block."""

    spec: LaunchSpec
    env: AgentEnv
    host: Host
    nproc: int
    policy: Policy
    rundir: RunDir
    environ: Mapping[str, str]
    """What this agent was started with."""
    supplies: bool = False
    """Slurm's commands start agents anew, and bring nodes."""
    contained: bool = False
    """Slurm's commands are not here: the batch script, outside, does what it can."""
    recorder: Recorder | None = None
    _beat: tuple[int, float] = field(default=(0, 0.0))
    _stays_out: bool = False

    def lead(self, roster: Roster | None, reason: str) -> LeaderServer:
        """A leader on this node. ``roster`` is None for the first one, which goes on from ``state.json``."""
        from elastic_hpc.agent.store import StoreHost

        stores = StoreHost(self.spec.rdzv_endpoint.port)
        self.recorder = self.recorder or Recorder(self.rundir, self.env.run, self.host)
        known: dict[str, Any] = {"inherited": roster, "reason": reason} if roster else self._first(self.recorder)
        addresses.allow_connections(4 * self.env.nodes)  # all may dial at once, and again before the first has ended
        leader = Leader(
            self.policy,
            node=self.env.node,
            nproc=self.nproc,
            now=time.monotonic(),
            supplied=self.supplies,
            host=self.host,
            **known,
        )
        supply = None
        if self.contained:
            log.info(
                "Slurm's commands are not here: no agent is started anew, no node is brought, the batch script requeues"
            )
        if self.supplies:
            source = SlurmSource(self.env, self.rundir, self.environ)
            supply = Supply(source, self.recorder.event, grow=self.policy.grow)

        async def open_store(round: int) -> int:
            return await asyncio.wrap_future(stores.open(round))

        return LeaderServer(leader, self.recorder, open_store, self._act, supply)

    def _first(self, recorder: Recorder) -> dict[str, Any]:
        """What the first leader of a run begins with."""
        state = self.rundir.read("state.json") or {}
        start = {"run": self.env.run, "job": self.env.job, "granted": self.env.nodes, "nproc_per_node": self.nproc}
        recorder.event("start", {"version": __version__, **start, **vars(self.policy)})
        names = [f"local{node}" for node in range(self.env.nodes)] if self.env.local else []
        if self.supplies:  # Slurm's answers are waited for elsewhere: they are for the record alone
            asked = (recorder, names)
            threading.Thread(target=self._ask_slurm, args=asked, name="allocation", daemon=True).start()
        counters = {name: state.get(name, 0) for name in ("round", "restarts", "requeues")}
        return {"granted": self.env.nodes, "granted_names": names, **counters}

    def _ask_slurm(self, recorder: Recorder, names: list[str]) -> None:
        """How the granted nodes are called, and since when the job has them."""
        with contextlib.suppress(SlurmError):
            names[:] = slurm.expand(self.environ.get("SLURM_STEP_NODELIST", ""))
        try:
            job = slurm.show_job(self.env.job)
        except SlurmError:
            return
        moments = {"submitted": job.submit_time, "started": job.start_time, "ends": job.end_time}
        recorder.event("allocation", {"run": self.env.run, **{k: slurm.epoch(text) for k, text in moments.items()}})

    def prepare(self) -> None:
        """The job's secret, and what was asked for."""
        self.rundir.make_secret()
        self.rundir.write(
            "spec.json",
            {
                **{f: str(v) for f, v in self.spec.options()},
                "script": self.spec.script,
                "script_args": self.spec.script_args,
                "module": self.spec.module,
                "job": self.env.job,
            },
        )

    def find_leader(self) -> Host | None:
        """Where the leader of this run listens, as the run directory says."""
        found = self.rundir.read("endpoint.json")
        if not found or found.get("run") != self.env.run:
            return None
        return Host(found["node"], found["host"], tuple(found["addresses"]), found["port"])

    def give_up(self, roster: Roster | None, waited: float, why: str, *, patient: bool) -> JobEnded | None:
        """This node has been without a leader for ``waited`` seconds, because of ``why``. As long as the record is
        touched somebody leads. Else, unless ``patient``, the job returns through the queue, or ends.
        """
        if self.env.joins:
            return self._leave(waited, why)
        if self._somebody_leads():
            if roster is None and waited > 2 * self.policy.heartbeat_timeout and self.find_leader():
                self._stay_out(why)
            return None
        if patient:
            return None
        said = self._verdict_of_this_run()
        if said is None:
            said = self._own_verdict(
                roster, f"no leader was found for {waited:.0f} s ({why}), and too few nodes to have another"
            )
        elif said.get("actor") == "batch script":  # it acts, when the last agent has left
            return JobEnded(said["outcome"], said["reason"])
        problem = self._do(said, [], alone=True, others=())
        return None if problem else JobEnded("lost", said["reason"])

    def _leave(self, waited: float, why: str) -> JobEnded | None:
        """A joiner never ends the job, and never keeps its node for one that is over or cannot be reached."""
        if said := self._verdict_of_this_run():
            return JobEnded("lost", f"the job is over: {said['reason']}")
        if waited < max(JOINER_PATIENCE, 4 * self.policy.heartbeat_timeout):
            return None
        if self._somebody_leads():
            self._stay_out(why)
        return JobEnded("lost", f"no leader was found for {waited:.0f} s: {why}")

    def _do(self, said: Mapping[str, Any], lost: list[str], *, alone: bool, others: Sequence[str]) -> str | None:
        """Act on a verdict. What ``elastic-srun`` runs in is not ours to requeue, or to start once more."""
        if self.contained:
            if alone:
                log.warning(
                    "the batch script is lost with its node, and Slurm's commands are not here: nobody ends the job, "
                    "which keeps its nodes until its time limit; type: scontrol requeue %s, or scancel %s",
                    self.env.job,
                    self.env.job,
                )
            return None
        if self.policy.can_requeue:
            return conclude.act(self.rundir, self.env, said, lost, environ=self.environ, alone=alone, others=others)
        if alone and self.environ.get("ENVIRONMENT") == "BATCH":
            return conclude.cancel(self.env)
        return None

    def _stay_out(self, why: str) -> None:
        """The leader cannot be reached from here: the job goes on without this node, and avoids it when it comes back
        from the queue.
        """
        if self._stays_out:
            return
        self._stays_out = True
        log.warning(
            "the leader cannot be reached: %s; name the interface that all nodes share: --interface IFNAME, or have "
            "its port opened between the nodes",
            why,
        )
        with contextlib.suppress(OSError):
            self.rundir.write_unfit(self.env.name, time.time(), f"the leader could not be reached: {why}")

    def _somebody_leads(self) -> bool:
        touched, now = self.rundir.heartbeat(), time.monotonic()
        if touched != self._beat[0] or not self._beat[1]:
            self._beat = touched, now
        return now - self._beat[1] < 2 * self.policy.heartbeat_timeout

    def _verdict_of_this_run(self) -> dict[str, Any] | None:
        try:
            said = self.rundir.read("verdict.json")
        except (ElasticError, OSError):
            return None
        return said if said and said["run"] == self.env.run else None

    def _own_verdict(self, roster: Roster | None, reason: str) -> dict[str, Any]:
        try:
            state = self.rundir.read("state.json") or {}
        except (ElasticError, OSError):
            state = {}
        restarts = max(state.get("restarts", 0), roster.restarts if roster else 0)
        requeues = max(state.get("requeues", 0), roster.requeues if roster else 0)
        decision = requeue_or_fail(reason, requeues, self.policy)
        outcome = {Action.FAIL: "failed", Action.REQUEUE: "requeue"}[decision.action]
        requeues += decision.action is Action.REQUEUE
        counters = {"round": roster.round if roster else 0, "restarts": restarts, "requeues": requeues}
        recorder = self.recorder or Recorder(self.rundir, self.env.run, self.host)
        recorder.state(**{**counters, "round": max(counters["round"], state.get("round", 0))})
        said = {"outcome": outcome, "cause": decision.cause, "reason": decision.reason, "failure": None, **counters}
        said["actor"] = "agents"
        recorder.event("verdict", said)
        recorder.verdict(said)
        recorder.close()
        return said

    async def _act(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None:
        said = {"outcome": verdict.outcome, "reason": verdict.reason}
        problem = await asyncio.to_thread(self._do, said, lost, alone=alone, others=others)
        if problem:
            log.warning("%s", problem)
