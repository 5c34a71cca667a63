"""How jobs are, from their records and from what Slurm says, and how that is shown. Pure.

What Slurm says wins on whether a job runs: a record cannot know of an end that nobody was left to write down.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_hpc.slurm import LIVES, Queued
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
    run_dir: str
    script: str
    """What runs, empty if the job has not started yet."""
    final: str | None
    """Slurm's word for its end, by the record; None if it has not ended by that."""
    known: Queued | None
    """What Slurm, or the launcher on this machine, says; None if it does not know the job."""
    problem: str
    """Why Slurm could not be asked; empty if it was, or there was no need."""
    silent: float | None
    """Seconds since the last sign of a leader, None for never."""


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
    note: str
    """What is to be known besides: why it waits, why the state is unknown, why it ended, that nobody leads."""
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

    @property
    def over(self) -> bool:
        """Whether it will not run again; False while that is not known."""
        return self.state not in LIVES and self.state != "UNKNOWN"


def view(seen: Seen, story: Story, now: float) -> JobView:
    """``now``: seconds since the epoch."""
    state, note = _state(seen, story)
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
        note=note,
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


def _state(seen: Seen, story: Story) -> tuple[str, str]:
    why = story.runs[-1].reason if story.runs else ""
    if seen.final:
        return seen.final, why
    if seen.problem:
        led = "no sign of a leader on record" if seen.silent is None else f"a leader was there {span(seen.silent)} ago"
        return "UNKNOWN", f"{seen.problem}; {led}"
    if seen.known is None:
        if not story.runs:
            return (
                "UNKNOWN",
                "Slurm does not know it, and it has not started: it was cancelled, or is another cluster's",
            )
        if story.runs[-1].outcome == "requeue":
            return "UNKNOWN", f"it was requeued ({why}), and Slurm does not know it any more: it was cancelled there"
        return "UNKNOWN", "Slurm does not know it any more, and its record has no end: it was cut off"
    if seen.known.state == "PENDING":
        return "PENDING", seen.known.reason + (f"; it was requeued: {why}" if why else "")
    if seen.known.state == "RUNNING" and (seen.silent is None or seen.silent > _SILENT):
        since = "yet" if seen.silent is None else f"since {span(seen.silent)}"
        return "RUNNING", f"nobody leads {since}"
    if seen.known.state == "RUNNING" and not story.current:
        return "RUNNING", "the world is being formed"
    return seen.known.state, why if seen.known.state not in {"RUNNING", "COMPLETING"} else ""


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


STYLES: Mapping[str, str] = {
    "RUNNING": "green",
    "COMPLETED": "green",
    "PENDING": "yellow",
    "UNKNOWN": "bold red",
    "FAILED": "red",
    "CANCELLED": "red",
}


def table(views: Sequence[JobView], width: int = 120) -> RenderableType:
    """All jobs, a line each, and below what is to be known besides. What has no room in ``width`` is left out."""
    columns: dict[str, list[str]] = {
        "job": [one.id for one in views],
        "state": [one.state for one in views],
        "nodes": [_nodes(one) for one in views],
        "step": [_number(one.step) for one in views],
        "left": ["" if one.time_left is None else span(one.time_left) for one in views],
        "goodput": [_percent(one.goodput) for one in views],
        "restarts": [_of(one.restarts, one.max_restarts) for one in views],
        "script": [one.script[:24] for one in views],
        "lost": [span(one.lost) if one.lost else "" for one in views],
        "steps/s": [_number(one.steps_per_second, ".2f") for one in views],
        "round": [str(one.round or "") for one in views],
    }  # the most important first
    made = Table(box=None, pad_edge=False, header_style="bold")
    used = 0
    for name, values in columns.items():
        needed = max(map(len, [name, *values])) + 2
        if any(values) and (used + needed <= width + 2 or not used):
            used += needed
            made.add_column(name, justify="left" if name in {"job", "state", "script"} else "right", no_wrap=True)
        else:
            columns[name] = []
    for row in zip(*filter(None, columns.values()), strict=True):
        made.add_row(row[0], *(Text(cell, STYLES.get(cell, "")) for cell in row[1:]))
    notes = [
        Text.assemble((one.id, "bold"), f" {one.note.splitlines()[0]}")
        for one in views
        if one.note and one.state != "COMPLETED"
    ]
    return Group(made, *([Text()] if notes else []), *notes)


def _nodes(one: JobView) -> str:
    asked = "" if one.min_nodes is None else f" of {one.min_nodes}:{one.max_nodes}"
    return f"{len(one.nodes)}{asked}" if one.nodes or asked else ""


def _of(count: int, most: int | None) -> str:
    return str(count) if most is None else f"{count} of {most}"


def _number(value: float | None, how: str = "d") -> str:
    return "" if value is None else format(value, how)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def card(one: JobView) -> RenderableType:
    """One job on a screen."""
    head = Text.assemble(
        ("job ", "bold"), (one.id, "bold"), "  ", (one.state, STYLES.get(one.state, "bold")), "  ", one.script
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()

    def row(name: str, *parts: str) -> None:
        if shown := ", ".join(filter(None, parts)):
            rows.add_row(name, Text(shown))

    row("", one.note)
    shown = " ".join(one.nodes[:16]) + (" ..." if len(one.nodes) > 16 else "")
    joined = f"{one.joiners} by jobs of their own" if one.joiners else ""
    row("nodes", _nodes(one), shown, joined)
    row(
        "workers",
        str(one.world_size) if one.world_size else "",
        f"round {one.round}",
        f"leader {one.leader}" * bool(one.leader),
    )
    row("restarts", _of(one.restarts, one.max_restarts), f"last: {one.last_restart}" if one.last_restart else "")
    row("requeues", _of(one.requeues, one.max_requeues) + " after failures", f"{max(0, one.runs - 1)} in all")
    speed = "" if one.steps_per_second is None else f"{one.steps_per_second:.2f} steps/s"
    row(
        "step",
        "not reported" if one.step is None else str(one.step),
        speed,
        "" if one.loss is None else f"loss {one.loss:.4g}",
    )
    left = "" if one.time_left is None else f"{span(one.time_left)} left"
    row(
        "time",
        f"ran {span(one.running)}" if one.running else "",
        f"queued {span(one.queued)}" if one.queued else "",
        left,
    )
    repeated = f"{one.repeated_steps} steps repeated" if one.repeated_steps else ""
    row(
        "lost",
        span(one.lost) if one.lost else "nothing",
        repeated,
        f"goodput {_percent(one.goodput)}" * (one.goodput is not None),
    )
    row("record", one.run_dir, f"{one.damaged} entries could not be understood" if one.damaged else "")
    return Group(head, rows)
