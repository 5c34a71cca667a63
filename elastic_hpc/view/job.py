"""A job at one moment: one model for the screens, for Python and for programs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_hpc.slurm.states import LIVES, WAITS
from elastic_hpc.view.account import Kind, account
from elastic_hpc.view.brought import brought
from elastic_hpc.view.scaling import efficiency, speeds
from elastic_hpc.view.state import Observed, last_reason, state_of
from elastic_hpc.view.story import Story

SCHEMA = 1
"""Version of ``as_json``, raised when a field changes its meaning or is removed; new fields may come at any time."""

_HAS_NODES = frozenset({"RUNNING", "COMPLETING", "SUSPENDED"})


@dataclass(frozen=True)
class JobView:
    """One job at one moment, as ``elastic-hpc status --json`` prints it. Times in seconds, null for unknown."""

    id: str
    """What Slurm calls the job; without Slurm, the name of its run directory."""
    slurm_id: str
    """``id``, or the id of the Slurm job that continues in its place, for example because it was resumed."""
    run_dir: str
    script: str
    """Empty if the job has not started yet."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...; UNKNOWN if Slurm does not answer, or does not
    know a job whose record has no end."""
    over: bool
    """Whether the job will not run again; False while Slurm does not answer and the record has no end."""
    note: str
    """An explanation of the state: why the job waits or has ended, why the state is unknown, that no agent leads."""
    reason: str
    """Why the last run ended, in a sentence; empty during the first run."""
    advice: tuple[str, ...]
    """What the user may do about the state."""
    output: tuple[str, ...]
    """The last lines of the output of a batch script that ended before an agent led the job."""
    failure: Mapping[str, Any] | None
    """The first failure of a job that failed: ``kind``, ``node``, ``rank``, ``exit_code``, ``message``, ``traceback``
    and so on."""
    nodes: tuple[str, ...]
    """The nodes of the world that trains, or that trained last if the job does not run, in rank order."""
    missing: Mapping[str, str]
    """Why nodes of the last run take no part, by name: they were lost, never came, or are not allowed to."""
    slow: Mapping[str, float]
    """By name, nodes of that world that are slower than the others, and by which factor."""
    min_nodes: int | None
    max_nodes: int | None
    joiners: int
    """Number of nodes that joiners have brought."""
    world_size: int
    """Workers of that world; 0 without one."""
    workers_kept: int
    """Workers of that world that kept their process from the previous round, in place."""
    leader: str
    """Name of the leader's node, empty for unknown."""
    round: int
    runs: int
    """How often the job has started."""
    resumed: int
    """How often it continued after an end, as another Slurm job, by ``--resume``."""
    restarts: int
    """Restarts charged so far, of ``max_restarts``."""
    max_restarts: int | None
    requeues: int
    """Requeues charged so far, which are those after failures, of ``max_requeues``."""
    max_requeues: int | None
    step: int | None
    """Last step that was reported."""
    steps_per_second: float | None
    """Speed of the last steps; null while the job does not train, or stands still."""
    no_step_for: float | None
    """Time since the last step of a job that trains, if a step is overdue; else null."""
    speeds: Mapping[int, float]
    """Steps per second by the number of nodes, over all rounds of that size."""
    efficiency: Mapping[int, float]
    """The speed per node, as a share of the speed per node on the fewest nodes, by the number of nodes."""
    loss: float | None
    starts_in: float | None
    """For a waiting job, time until Slurm expects it to start; null if Slurm has no estimate."""
    queued: float
    """Time in the queue."""
    running: float
    """Time since the nodes were granted, over all runs."""
    time_left: float | None
    """Time until the time limit."""
    lost: float
    """Time after the first step that produced no step which was kept; see ``account.Account``."""
    repeated_steps: int
    goodput: float | None
    """Share of the nodes' time that produced steps which were kept; null if steps are not reported."""
    silent: float | None
    """Time since a leader's last sign of life."""
    node_seconds: Mapping[Kind, float]
    """The nodes' time, by what they spent it on; see ``account.MEANINGS``."""
    hang_timeout: float | None
    """Time without a sign of life after which workers count as hung; null for never, or if not known yet."""
    hang_timeout_reason: str
    """Where ``hang_timeout`` comes from; empty without a timeout."""
    growth: Mapping[str, Any]
    """The gains and costs of growth, see ``brought.Brought``; empty if no joiner has brought a node."""
    last_restart: str
    """Why the last restart was charged; empty if no restart was charged."""
    damaged: int
    """Events of the record that could not be understood."""

    @property
    def summary(self) -> str:
        """The state and its note."""
        return f"{self.state}: {self.note}" if self.note else self.state

    @property
    def has_nodes(self) -> bool:
        """Whether the job holds nodes now, so that its times grow."""
        return self.state in _HAS_NODES


def view(job: Observed, story: Story, now: float) -> JobView:
    """``now``: seconds since the epoch."""
    state, note, advice = state_of(job, story)
    over = state not in LIVES and not (state == "UNKNOWN" and job.problem)
    has_nodes = state in _HAS_NODES
    spent = account(story, now if has_nodes else None)
    last = story.rounds[-1] if story.rounds else None
    world = None if state == "RUNNING" and not story.current else last
    charged = next((round for round in reversed(story.rounds) if round.charged), None)
    limit = (job.queued.ends if job.queued else None) or (story.runs[-1].ends if story.runs else None)
    limits = story.limits
    known = speeds(story)
    no_step_for = story.no_step_for(now) if has_nodes else None
    starts = job.queued.starts if job.queued and state in WAITS else None
    return JobView(
        id=job.id,
        slurm_id=job.slurm_id,
        run_dir=job.run_dir,
        script=job.script,
        state=state,
        over=over,
        note=note,
        reason=last_reason(job, story) or (note if over else ""),
        advice=advice,
        output=job.output,
        failure=job.verdict["failure"] if job.final and job.verdict and job.final != "COMPLETED" else None,
        nodes=world.nodes if world else (),
        missing=story.missing,
        slow=story.slow if world and not over else {},
        min_nodes=limits.get("min_nodes"),
        max_nodes=limits.get("max_nodes"),
        joiners=sum(joiner.left is None for joiner in story.joiners) if has_nodes else 0,
        world_size=world.world_size if world else 0,
        workers_kept=world.workers_kept if world else 0,
        leader=world.leader if world else "",
        round=last.number if last else 0,
        runs=len(story.runs),
        resumed=len(story.resumed),
        restarts=story.restarts,
        max_restarts=limits.get("max_restarts"),
        requeues=story.requeues,
        max_requeues=limits.get("max_requeues"),
        step=next((round.last for round in reversed(story.rounds) if round.last is not None), None),
        steps_per_second=story.steps_per_second if has_nodes and story.current and no_step_for is None else None,
        no_step_for=no_step_for,
        speeds=known,
        efficiency=efficiency(known),
        loss=next((round.loss for round in reversed(story.rounds) if round.loss is not None), None),
        starts_in=max(0.0, starts - now) if starts else None,
        queued=spent.queued,
        running=spent.ran,
        time_left=max(0.0, limit - now) if limit and has_nodes else None,
        lost=spent.lost,
        repeated_steps=spent.repeated_steps,
        goodput=spent.goodput,
        node_seconds=spent.node_seconds,
        growth=vars(brought(story, now if has_nodes else None)) if story.joiners else {},
        hang_timeout=story.hang_timeout,
        hang_timeout_reason=story.hang_timeout_reason,
        silent=job.silent if not job.final else None,
        last_restart=charged.cause if charged else "",
        damaged=story.damaged,
    )


def as_json(views: Sequence[JobView], now: float, problem: str) -> dict[str, Any]:
    """What ``--json`` prints. ``slurm`` says why Slurm did not answer; null if it did."""
    return {"schema": SCHEMA, "time": now, "slurm": problem or None, "jobs": [vars(view) for view in views]}
