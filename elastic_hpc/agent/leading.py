"""An agent as the leader of its job: the leader is put together with its record, stores, and the supply of nodes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from elastic_hpc import __version__, slurm
from elastic_hpc.agent.ending import Ending, published
from elastic_hpc.agent.giving_way import GivingWay
from elastic_hpc.agent.health import health_of
from elastic_hpc.agent.joiners import SlurmSource
from elastic_hpc.agent.lookout import Lookout, Outlook
from elastic_hpc.agent.supply import Supply
from elastic_hpc.agent.telling import Comment, StandstillAlarm
from elastic_hpc.agent.threads import on_thread
from elastic_hpc.errors import JobEnded, SlurmError
from elastic_hpc.membership import strikes, wishes
from elastic_hpc.membership.hangs import Rhythm
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.policy import Policy, Verdict
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.yielding import Rule
from elastic_hpc.network import addresses
from elastic_hpc.network.channel import Link
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.record.endpoint import Published
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.registry import remember_once
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
from elastic_hpc.workers.output import is_shown

log = logging.getLogger(__name__)

CONTROL_PORT_OFFSET = 32
"""Offset of the control port from the endpoint's: the 32 ports below it are for the stores of the rounds."""

_GUESS_AFTER = 15.0
"""Seconds without a leader of this run in the run directory, after which an agent dials the job's first node."""


@dataclass
class Leading:
    """The part of the agent that the control thread uses (``bridge.Outside``): makes the leader when this node must
    lead, looks up the leader in the run directory, and lets ``Ending`` give up when no leader can be found.
    """

    spec: LaunchSpec
    env: AgentEnv
    host: Host
    nproc: int
    policy: Policy
    rundir: RunDir
    environ: Mapping[str, str]
    """The environment that this agent was started with."""
    open_store: Callable[[int], Awaitable[int]]
    """As in ``LeaderServer``."""
    dial: Callable[[Host], Awaitable[Link]]
    """As in ``SlurmSource``."""
    supplies: bool = False
    """Slurm's commands are available to restart agents, and to bring nodes."""
    contained: bool = False
    """As in ``Ending``."""
    job: str = ""
    """The job in the identity of its agents (``network.identity``)."""
    recorder: Recorder | None = None
    """Set as soon as this node has led."""
    _start: dict[str, Any] = field(default_factory=dict)
    """Counters and strikes of the previous run, with which the first leader begins."""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._ending = Ending(self.env, self.policy, self.rundir, self.environ, self.contained, self._recorder_or_new)

    def lead(self, promises: Promises, reason: str) -> LeaderServer:
        """A leader on this node. ``prepare`` precedes the first leader, whose node holds no roster yet."""
        self.recorder = self._recorder_or_new()
        start: dict[str, Any] = {"reason": reason} if promises.roster else self._first(self.recorder)
        addresses.allow_connections(4 * self.env.nodes)  # all may dial at once, and again soon
        leader = Leader(
            self.policy,
            node=self.env.node,
            nproc=self.nproc,
            now=time.monotonic(),
            supplied=self.supplies,
            gives_back=self.supplies,
            host=self.host,
            promises=promises,
            **start,
        )
        if self.contained:
            log.info(
                "Slurm's commands are not here: no agent restarts, the job does not grow, the batch script requeues"
            )
        source = SlurmSource(self.env, self.rundir, self.environ, self.dial)
        supply = Supply(source, self.recorder.event, grow=self.policy.grow) if self.supplies else None
        lookout = Lookout(self._outlooks(self.recorder), self.recorder.event)
        return LeaderServer(leader, self.recorder, self.open_store, self._act, supply, lookout)

    def _outlooks(self, recorder: Recorder) -> list[Outlook]:
        """What the leader looks at regularly."""
        reserved = "SLURM_JOB_RESERVATION" in self.environ
        outlooks = health_of(self.rundir.notices, self.spec.health_dir, asks=self.supplies, reserved=reserved).outlooks
        if self.supplies:
            outlooks.append(Comment(self.env.job).outlook)
        if StandstillAlarm.wanted(self.environ):
            outlooks.append(StandstillAlarm(self.rundir, self.environ).outlook)
        if self.supplies and self.spec.yield_to:
            rule = Rule.of(self.spec.yield_to, self.spec.yield_every.total_seconds())
            outlooks.append(GivingWay(rule, self.env.job, recorder.event).outlook)
        return outlooks

    def _recorder_or_new(self) -> Recorder:
        shown = partial(is_shown, self.spec.tee, self.spec.local_ranks_filter)
        return self.recorder or Recorder(self.rundir, self.env.run, self.host, self.job, shown)

    def _first(self, recorder: Recorder) -> dict[str, Any]:
        """The nodes and counters with which the first leader begins. Records the start of the run."""
        run = {"run": self.env.run, "job": self.env.job, "granted": self.env.nodes, "nproc_per_node": self.nproc}
        policy = self.policy.within(self._start.get("bounds"), None)
        limit = self.spec.hang_timeout.limit
        given = {"hang_timeout": limit.total_seconds() if limit else None}
        recorder.event("start", {"version": __version__, **run, **vars(policy), **given})
        names = [f"local{node}" for node in range(self.env.nodes)] if self.env.local else []
        if self.supplies:  # on a thread: nothing but the record waits for Slurm's answers
            args = (recorder, names)
            threading.Thread(target=self._record_allocation, args=args, name="allocation", daemon=True).start()
        return {"granted": self.env.nodes, "granted_names": names, **self._start}

    def _record_allocation(self, recorder: Recorder, names: list[str]) -> None:
        """List the job, fill in the ``names`` of the granted nodes, and record since when the job has had them."""
        remember_once(self.rundir.path)  # the user may have submitted the script with sbatch
        with contextlib.suppress(SlurmError):
            names[:] = slurm.expand(self.environ.get("SLURM_STEP_NODELIST", ""))
        try:
            job = slurm.show_job(self.env.job)
        except SlurmError:
            return
        moments = {"submitted": job.submit_time, "started": job.start_time, "ends": job.end_time}
        recorder.event("allocation", {"run": self.env.run, **{k: slurm.epoch(text) for k, text in moments.items()}})

    def prepare(self) -> None:
        """Make the job's secret, record its options, and read the counters with which the first leader begins."""
        self.rundir.make_secret()
        state = self.rundir.read("state.json") or {}
        self._start = {
            **{name: state.get(name, 0) for name in ("round", "restarts", "requeues")},
            "strikes": strikes.live(strikes.load(state.get("strikes", ())), time.time()),
            "bounds": wishes.saved(state),
            "rhythm": Rhythm.of(state.get("rhythm")),
        }
        self.recorder = self._recorder_or_new()
        self.recorder.options(
            {
                **{f: str(v) for f, v in self.spec.options()},
                "script": self.spec.script,
                "script_args": self.spec.script_args,
                "module": self.spec.module,
                "job": self.env.job,
                "folder": self.environ.get("SLURM_SUBMIT_DIR", ""),
            }
        )

    def find_leader(self) -> Published | None:
        """The leader in the run directory. If the directory names none for ``_GUESS_AFTER`` seconds, perhaps because it
        has been full since the previous run: the address at which the first leader listens if its port was free.
        """
        found = published(self.rundir, self.env.run)
        if found or time.monotonic() - self._began < _GUESS_AFTER or not (head := self.spec.rdzv_endpoint.head):
            return found
        port = self.spec.rdzv_endpoint.port + CONTROL_PORT_OFFSET
        return Published(self.env.run, Host(0, head, (head,), port))

    def give_up(self, roster: Roster | None, waited: float, why: str, **how: Any) -> JobEnded | None:
        """See ``Ending.give_up``."""
        return self._ending.give_up(roster, waited, why, **how)

    async def _act(self, verdict: Verdict, lost: list[str], *, alone: bool, others: list[str]) -> None:
        body = {"outcome": verdict.outcome, "reason": verdict.reason}
        problem = await on_thread(self._ending.act, body, lost, alone=alone, others=others)
        if problem:
            log.warning("%s", problem)
