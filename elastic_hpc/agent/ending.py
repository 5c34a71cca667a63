"""How an agent ends a run: it acts on the verdict of its own leader, or gives up when it finds no leader."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic_hpc.agent import conclude, once_more
from elastic_hpc.agent.turns import Turns
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.membership import wishes
from elastic_hpc.membership.hangs import Rhythm
from elastic_hpc.membership.leaderless import LEADERLESS, Conclude, GiveUp, KeepLooking, without_leader
from elastic_hpc.membership.policy import Action, Policy
from elastic_hpc.membership.roster import Roster
from elastic_hpc.membership.rules import requeue_or_fail
from elastic_hpc.network.identity import RunIsOver
from elastic_hpc.record.endpoint import Published, read_published
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv

log = logging.getLogger(__name__)


def published(rundir: RunDir, run: int) -> Published | None:
    """The leader of ``run`` in the run directory, if there is one. Raises RunIsOver if a later run has a leader."""
    found = read_published(rundir)
    if found and found.run > run:
        raise RunIsOver(run, found.run)
    return found if found and found.run == run else None


@dataclass
class Ending:
    """``act`` and ``give_up`` may block: they run Slurm's commands, and use the run directory."""

    env: AgentEnv
    policy: Policy
    rundir: RunDir
    environ: Mapping[str, str]
    """The environment that this agent was started with."""
    contained: bool
    """The agent runs in a container without Slurm's commands: the batch script, outside, does what it can."""
    open_recorder: Callable[[], Recorder]
    _last_beat: tuple[int, float] = field(default=(0, 0.0))
    """The last heartbeat of a leader (``RunDir.heartbeat``), and when this agent noticed that sign."""
    _stays_out: bool = False

    def __post_init__(self) -> None:
        self._turns = Turns(self.rundir, self.env.run, self.env.name)

    def act(self, verdict: Mapping[str, Any], lost: list[str], *, alone: bool, others: Sequence[str]) -> str | None:
        """Requeue or end the job. Returns the problem, if any. The parameters are those of ``conclude.act``. A job in
        the user's own allocation (``elastic-srun``) is not requeued, and keeps its nodes. If ``alone``, this agent
        takes a turn, so that no agent without a leader acts at the same time.
        """
        if alone:
            self._turns.take()
        problem = self._act(verdict, lost, alone=alone, others=others)
        if alone and not problem and (others or self.env.local or self.contained or not self.policy.can_requeue):
            self._turns.done(lambda: self._stands(verdict))
        return problem

    def _act(self, verdict: Mapping[str, Any], lost: list[str], *, alone: bool, others: Sequence[str]) -> str | None:
        if not alone and verdict["outcome"] != "requeue":
            kept = self.contained or not self.policy.can_requeue
            if not kept:
                once_more.settle(self.rundir, self.environ, verdict["outcome"])
            return conclude.let_go(self.rundir, self.env, [] if kept else lost)
        if self.contained:
            if alone:
                log.warning(
                    "the batch script is lost with its node, and Slurm's commands are not here: nothing ends the job, "
                    "which keeps its nodes until its time limit; type: scontrol requeue %s, or scancel %s",
                    self.env.job,
                    self.env.job,
                )
            return None
        if self.policy.can_requeue:
            return conclude.act(self.rundir, self.env, verdict, lost, environ=self.environ, alone=alone, others=others)
        if alone and self.environ.get("ENVIRONMENT") == "BATCH":
            return conclude.cancel(self.rundir, self.env, unless_led=verdict.get("actor") == LEADERLESS)
        return None

    def give_up(
        self,
        roster: Roster | None,
        waited: float,
        why: str,
        *,
        patient: bool,
        others: Sequence[str] = (),
        is_led: Callable[[], bool] = lambda: False,
    ) -> JobEnded | None:
        """See ``network.node.Node``. ``is_led`` returns whether the agent has a leader again, which may have happened
        while this method waited for a file system. Raises RunIsOver if a later run has a leader.
        """
        with contextlib.suppress(ElasticError, OSError):
            published(self.rundir, self.env.run)
        step = without_leader(
            waited,
            why,
            joins=self.env.joins,
            ever_led=roster is not None,
            patient=patient,
            heartbeat_timeout=self.policy.heartbeat_timeout,
            read_verdict=self._read_verdict,
            somebody_leads=self._somebody_leads,
            somebody_acts=self._turns.are_done,
        )
        if is_led():
            return None
        match step:
            case KeepLooking(unreachable):
                if unreachable and published(self.rundir, self.env.run):
                    self._stay_out(why)
                return None
            case GiveUp(outcome, reason, unreachable):
                if unreachable:
                    self._stay_out(why)
                return JobEnded(outcome, reason, logged=outcome != "lost")
            case Conclude(verdict):
                if not self._turns.take() or is_led():
                    return None
                verdict = verdict or self._write_verdict(
                    roster,
                    f"no leader was found for {waited:.0f} s ({why}), and too few nodes are left to elect one",
                )
                if problem := self.act(verdict, [], alone=True, others=others):
                    log.warning("%s; trying again later", problem)
                    self._turns.failed()
                    return None
                return JobEnded("lost", verdict["reason"])

    def _stands(self, verdict: Mapping[str, Any]) -> bool:
        """Whether no leader has withdrawn ``verdict``, as far as this agent can see."""
        try:
            return verdict.get("actor") != LEADERLESS or self.rundir.verdict(self.env.run) is not None
        except (ElasticError, OSError):
            return True

    def _stay_out(self, why: str) -> None:
        """The leader cannot be reached from this node: the job continues without the node, and avoids it after a
        requeue.
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
        """Whether a leader has shown its heartbeat in the last two heartbeat timeouts. Also true for that long after
        the first call.
        """
        touched, now = self.rundir.heartbeat(), time.monotonic()
        if touched != self._last_beat[0] or not self._last_beat[1]:
            self._last_beat = touched, now
        return now - self._last_beat[1] < 2 * self.policy.heartbeat_timeout

    def _read_verdict(self) -> dict[str, Any] | None:
        """The verdict of this run."""
        try:
            return self.rundir.verdict(self.env.run)
        except (ElasticError, OSError):
            return None

    def _write_verdict(self, roster: Roster | None, reason: str) -> dict[str, Any]:
        """Write the verdict of a run without a leader: requeue, or fail if that is not possible."""
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
        recorder = self.open_recorder()
        bounds = wishes.saved(state)
        counted = {**counters, "round": max(counters["round"], state.get("round", 0))}
        recorder.state(**counted, bounds=bounds, rhythm=Rhythm.of(state.get("rhythm")))
        verdict = {"outcome": outcome, "cause": decision.cause, "reason": decision.reason, "failure": None, **counters}
        verdict |= {"actor": LEADERLESS, "node": self.env.name}
        recorder.event("verdict", verdict)
        recorder.verdict(verdict)
        recorder.flush()  # but do not close it: this agent may lead later
        return verdict
