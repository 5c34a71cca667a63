"""How a job is, from its record and from what Slurm says: the one model of it, for the screens, for Python and for
programs. Pure.

What Slurm says wins on whether a job runs: a record cannot know of an end that nobody was left to write down.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from elastic_hpc.slurm.states import LIVES, WAITS, Queued, SlurmJob
from elastic_hpc.view.account import Kind, account
from elastic_hpc.view.story import Story

SCHEMA = 1
"""Of ``as_json``. A new number when a field changes its meaning or goes; new fields may come at any time."""

_HAS_NODES = frozenset({"RUNNING", "COMPLETING", "SUSPENDED"})
_SILENT = 30.0
"""Seconds without a sign of a leader after which a running job is said to be without one."""


@dataclass(frozen=True)
class Seen:
    """What was observed of one job, besides its events."""

    id: str
    slurm_id: str
    """The same, or that of the job that goes on in its place."""
    run_dir: str
    script: str
    """What runs, empty if the job has not started yet."""
    verdict: Mapping[str, Any] | None = None
    """How its last run has ended, by the record."""
    led: int = 0
    """The run that somebody led last."""
    held: bool | None = None
    """Whether its launcher on this machine runs; None for a job of Slurm's."""
    known: Queued | None = None
    """What Slurm says; None if it does not know the job."""
    problem: str = ""
    """Why Slurm could not be asked; empty if it was, or there was no need."""
    silent: float | None = None
    """Seconds since the last sign of a leader, None for never."""
    batch: SlurmJob | None = None
    """What Slurm says about a job that is over without anybody's having led it; None if it was not asked."""
    lacks: str = ""
    """A folder into which ``batch`` should write, and which is not there."""

    @property
    def final(self) -> str | None:
        """Slurm's word for its end, by the record; None if it has not ended by that."""
        if self.verdict is None or self.verdict["outcome"] == "requeue" or self.led > self.verdict["run"]:
            return None
        failed = "CANCELLED" if self.verdict["cause"] == "user" else "FAILED"
        return "COMPLETED" if self.verdict["outcome"] == "finished" else failed


@dataclass(frozen=True)
class JobView:
    """One job at one moment, as ``elastic-hpc status --json`` has it. Times in seconds, null for unknown."""

    id: str
    """What Slurm calls it, or the name of its run directory where there is no Slurm."""
    run_dir: str
    script: str
    """Empty if it has not started yet."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...; UNKNOWN if Slurm cannot be asked, or does not
    know a job whose record has no end."""
    over: bool
    """Whether it will not run again; False while that is not known, since Slurm cannot be asked."""
    note: str
    """What is to be known besides: why it waits, why the state is unknown, why it ended, that nobody leads."""
    reason: str
    """Why its last run ended, in a sentence; empty while the first one runs."""
    advice: tuple[str, ...]
    """What to do about the state."""
    failure: Mapping[str, Any] | None
    """The first failure of a job that failed: ``kind``, ``node``, ``rank``, ``exit_code``, ``message``, ``traceback``
    and so on."""
    nodes: tuple[str, ...]
    """Of the world that trains, or trained last, in rank order."""
    min_nodes: int | None
    max_nodes: int | None
    joiners: int
    """Nodes that are there by jobs of their own."""
    world_size: int
    """Workers; 0 before the first world."""
    leader: str
    """Name of the leader's node, empty for unknown."""
    round: int
    runs: int
    """How often it has started."""
    restarts: int
    """Charged so far, of ``max_restarts``."""
    max_restarts: int | None
    requeues: int
    """Charged so far, of ``max_requeues``: those after failures."""
    max_requeues: int | None
    step: int | None
    """Last step that was reported."""
    steps_per_second: float | None
    """Lately, while it trains."""
    loss: float | None
    queued: float
    """Spent in the queue."""
    running: float
    """Since the nodes were granted, over all runs."""
    time_left: float | None
    """Until the time limit."""
    lost: float
    """Since the first step, without a step that was kept; see ``account.Account``."""
    repeated_steps: int
    goodput: float | None
    """Share of the nodes' time that produced steps which were kept; null if steps are not reported."""
    silent: float | None
    """Since the last sign of a leader."""
    node_seconds: Mapping[Kind, float]
    """The nodes' time, by what it was spent on; see ``account.MEANINGS``."""
    last_restart: str
    """Why the last one was charged, empty if none was."""
    damaged: int
    """Events of the record that could not be understood."""

    @property
    def has_nodes(self) -> bool:
        """Whether it holds nodes, so that its time goes on."""
        return self.state in _HAS_NODES


def view(seen: Seen, story: Story, now: float) -> JobView:
    """``now``: seconds since the epoch."""
    state, note, advice = _state(seen, story)
    over = state not in LIVES and not (state == "UNKNOWN" and seen.problem)
    lives = state in _HAS_NODES
    counted = account(story, now if lives else None)
    last = story.rounds[-1] if story.rounds else None
    charged = next((one for one in reversed(story.rounds) if one.charged), None)
    ends = (seen.known.ends if seen.known else None) or (story.runs[-1].ends if story.runs else None)
    limits = story.limits
    return JobView(
        id=seen.id,
        run_dir=seen.run_dir,
        script=seen.script,
        state=state,
        over=over,
        note=note,
        reason=_reason(seen, story) or (note if over else ""),
        advice=advice,
        failure=seen.verdict["failure"] if seen.final and seen.verdict and seen.final != "COMPLETED" else None,
        nodes=last.nodes if last else (),
        min_nodes=limits.get("min_nodes"),
        max_nodes=limits.get("max_nodes"),
        joiners=sum(one.left is None for one in story.joiners) if lives else 0,
        world_size=last.world_size if last else 0,
        leader=last.leader if last else "",
        round=last.number if last else 0,
        runs=len(story.runs),
        restarts=story.restarts,
        max_restarts=limits.get("max_restarts"),
        requeues=story.requeues,
        max_requeues=limits.get("max_requeues"),
        step=next((one.last for one in reversed(story.rounds) if one.last is not None), None),
        steps_per_second=story.steps_per_second if lives and story.current else None,
        loss=next((one.loss for one in reversed(story.rounds) if one.loss is not None), None),
        queued=counted.queued,
        running=counted.ran,
        time_left=max(0.0, ends - now) if ends and lives else None,
        lost=counted.lost,
        repeated_steps=counted.repeated_steps,
        goodput=counted.goodput,
        node_seconds=counted.node_seconds,
        silent=seen.silent if not seen.final else None,
        last_restart=charged.cause if charged else "",
        damaged=story.damaged,
    )


class _State(NamedTuple):
    word: str
    note: str = ""
    advice: tuple[str, ...] = ()


def _reason(seen: Seen, story: Story) -> str:
    """Why its last run ended; empty while the first one runs."""
    return str(seen.verdict["reason"]) if seen.verdict else story.runs[-1].reason if story.runs else ""


def _state(seen: Seen, story: Story) -> _State:
    """The one place that decides how a job is."""
    why, known = _reason(seen, story), seen.known
    if seen.final:
        return _State(seen.final, why)
    if seen.held is not None:
        lives = _State("RUNNING", _led(seen, story))
        return lives if seen.held else _State("FAILED", why or "its launcher ended without a verdict")
    if seen.problem:
        led = "no sign of a leader on record" if seen.silent is None else f"a leader was there {span(seen.silent)} ago"
        return _State("UNKNOWN", f"{seen.problem}; {led}")
    if known is None:
        return _forgotten(seen, story, why)
    if known.state in WAITS:
        told = known.reason + (f"; it was requeued: {why}" if why else "")
        return _State(known.state, told, _to_start(seen, known.reason))
    if known.state in LIVES:
        return _State(known.state, _led(seen, story) if known.state == "RUNNING" else "")
    if not story.runs:
        return _unled(seen, known)
    told = f"Slurm ended it; before, it was requeued: {why}" if why else "Slurm ended it, its record has no end"
    return _State(known.state, told)


def _led(seen: Seen, story: Story) -> str:
    if seen.silent is None or seen.silent > _SILENT:
        return f"nobody leads {'yet' if seen.silent is None else f'since {span(seen.silent)}'}"
    return "" if story.current else "the world is being formed"


def _forgotten(seen: Seen, story: Story, why: str) -> _State:
    ask = (f"see what Slurm's accounting says, if the site has it: sacct -j {seen.slurm_id}",)
    if not story.runs:
        told = "Slurm does not know it, and no agent has led it: it was cancelled, it failed, or is another cluster's"
    elif story.runs[-1].outcome == "requeue":
        told = f"it was requeued ({why}), and Slurm does not know it any more: it was cancelled there"
    else:
        told = "Slurm does not know it any more, and its record has no end: it was cut off"
    return _State("UNKNOWN", told, ask)


def _to_start(seen: Seen, reason: str) -> tuple[str, ...]:
    """What to do about a job that waits for ``reason`` and will not start by itself."""
    if reason == "DependencyNeverSatisfied":
        return (f"it will never start: elastic-hpc stop {seen.id}, and submit it again with another --dependency",)
    if "held" in reason.lower():
        who = "ask your administrator, or" if reason == "JobHeldAdmin" else "let it go, when its cause is mended:"
        return (f"{who} scontrol release {seen.slurm_id}",)
    return ()


def _unled(seen: Seen, known: Queued) -> _State:
    """Slurm has ended it before an agent led it."""
    batch = seen.batch
    if batch is None:
        told = f"it ended before an agent led it (Slurm: {known.reason})"
        return _State(known.state, told, (f"see what Slurm says: scontrol show job {seen.slurm_id}",))
    said = f"(Slurm: {batch.reason}, exit code {batch.exit_code})"
    if not batch.batch_host:
        how = "was cancelled" if known.state == "CANCELLED" else "ended"
        return _State(known.state, f"it {how} while it waited in the queue (Slurm: {batch.reason})")
    if seen.lacks:
        told = f"its batch script never ran: the folder of its output is not there: {seen.lacks} {said}"
        return _State(known.state, told, (f"make it, then submit again: mkdir -p {shlex.quote(seen.lacks)}",))
    if batch.reason == "JobLaunchFailure":
        told = f"its batch script never ran: {batch.batch_host} could not start it {said}"
        advice = f"submit it again with --exclude {batch.batch_host}, and tell your administrator of that node"
        return _State(known.state, told, (advice,))
    told = f"it ended before an agent led it {said}"
    return _State(known.state, told, (f"see what its batch script wrote: {batch.output}",))


def as_json(views: Sequence[JobView], now: float, problem: str) -> dict[str, Any]:
    """What ``--json`` prints. ``slurm`` says why Slurm could not be asked, null if it could."""
    jobs = [{each.name: getattr(one, each.name) for each in fields(one)} for one in views]
    return {"schema": SCHEMA, "time": now, "slurm": problem or None, "jobs": jobs}


def clock(when: float) -> str:
    """``when``, in seconds since the epoch, as date and time of this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def span(seconds: float) -> str:
    """A duration for a person, for example ``4.2 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, size, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"
