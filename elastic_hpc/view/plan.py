"""Which MIN:MAX to request: when Slurm would start a job at several sizes, and when its training would be done. Pure.

Slurm estimates the start on K to MAX nodes, for several K: when K nodes will be free, and how many will be free then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_hpc.slurm.states import Estimate
from elastic_hpc.view.scaling import Scaling
from elastic_hpc.view.times import clock, span

SCHEMA = 1
"""Version of ``as_json``, raised when a field changes its meaning or is removed."""

_MOST = 6
"""The most sizes to ask Slurm about."""
_AT_ONCE = 60.0
"""Seconds within which a start counts as at once."""
_WORTH = 0.02
"""The share of the time to finish that a later start, or growth, must save to be worth it."""


def chosen(sizes: Sequence[int]) -> list[int]:
    """The sizes to ask Slurm about: all of ``sizes``, which ascend, or six of them, evenly by ratio."""
    if len(sizes) <= _MOST:
        return list(sizes)
    ratio = (sizes[-1] / sizes[0]) ** (1 / (_MOST - 1))
    wanted = (sizes[0] * ratio**step for step in range(_MOST))
    return sorted({min(sizes, key=lambda size: abs(size - want)) for want in wanted})


@dataclass(frozen=True)
class Row:
    """What a request for ``nodes`` leads to. Times in seconds from now, None for unknown."""

    nodes: str
    """MIN:MAX."""
    starts_in: float | None
    starts_with: int
    """Nodes of the first world; 0 for unknown."""
    done_in: float | None
    """When the training is done if the job keeps that size."""
    done_in_grown: float | None
    """The same with ``--grow``, if each further node comes when Slurm would start a job of that many nodes."""
    refused: str
    """Why Slurm refuses the job; empty if Slurm would accept it."""

    @property
    def starts(self) -> str:
        return _when(self.starts_in, self.refused)


@dataclass(frozen=True)
class Further:
    """Growth to ``nodes`` in all by joiners with options of their own. ``starts_in``, ``refused``: as in ``Row``."""

    nodes: int
    starts_in: float | None
    refused: str

    def __str__(self) -> str:
        return f"{self.nodes} nodes {_when(self.starts_in, self.refused)}"


def _when(starts_in: float | None, refused: str) -> str:
    if refused:
        return "refused"
    if starts_in is None:
        return "no estimate"
    return "at once" if starts_in < _AT_ONCE else f"in {span(starts_in)}"


@dataclass(frozen=True)
class Advice:
    rows: Sequence[Row]
    """The smallest size first."""
    ask_for: str
    """The options to use; empty if Slurm gives no estimate at all."""
    why: Sequence[str]
    """The reasons, a sentence each."""
    growth: Sequence[Further] = ()
    """Empty if joiners have the options of the job itself."""


def plan(
    estimates: Sequence[Estimate],
    sizes: Sequence[int],
    scaling: Scaling,
    work: float | None,
    now: float,
    joiners: Sequence[Estimate] = (),
) -> Advice:
    """``sizes``: the numbers of nodes that a world may have, ascending. ``work``: how long the training takes, in steps
    of ``scaling``; None for unknown. ``now``: seconds since the epoch. ``joiners``: if joiners have options of their
    own, when Slurm would start the number of them that brings the job from MIN to a larger size.
    """
    growth = [
        Further(sizes[0] + found.least, None if found.starts is None else max(0.0, found.starts - now), found.refused)
        for found in joiners
    ]
    further = [(grown.starts_in, grown.nodes) for grown in growth if grown.starts_in is not None]
    known = [found for found in estimates if found.starts is not None]
    worlds = [(max(0.0, (found.starts or now) - now), _world(found, sizes)) for found in known]
    rows = []
    for found in estimates:
        starts_in = starts_with = done = grown = None
        if found in known:
            starts_in, starts_with = worlds[at := known.index(found)]
            if work is not None:
                done = _done(worlds[at : at + 1], scaling, work)
                grown = _done([worlds[at], *further] if joiners else worlds[at:], scaling, work)
        rows.append(Row(f"{found.least}:{sizes[-1]}", starts_in, starts_with or 0, done, grown, found.refused))
    known_rows = [row for row in rows if row.starts_in is not None]
    return Advice(rows, *_advice(known_rows, scaling, work, further=bool(growth)), growth)


def _world(found: Estimate, sizes: Sequence[int]) -> int:
    return max((size for size in sizes if size <= (found.nodes or found.least)), default=found.least)


def _done(worlds: Sequence[tuple[float, int]], scaling: Scaling, work: float) -> float:
    """When a job completes ``work`` that has each of ``worlds`` from its time on, unless that world is not faster."""
    at, nodes = worlds[0]
    for later, more in worlds[1:]:
        if scaling.speed(more) <= scaling.speed(nodes):
            continue
        done = max(0.0, later - at) * scaling.speed(nodes)
        if done >= work:
            break
        at, nodes, work = max(at, later), more, work - done
    return at + work / scaling.speed(nodes)


def _advice(rows: Sequence[Row], scaling: Scaling, work: float | None, *, further: bool) -> tuple[str, list[str]]:
    """``further``: the user has said where further nodes come from."""
    if not rows:
        return "", ["Slurm gives no estimate; a smaller MIN never starts later than a larger one"]
    first, last = rows[0], rows[-1]
    assert first.starts_in is not None
    if work is None:
        later = [
            row
            for before, row in pairwise(rows)
            if (row.starts_in or 0.0) - first.starts_in >= _AT_ONCE and row.starts_with > before.starts_with
        ]
        if not later:
            grow = " --grow" if further else ""
            return f"--nodes {first.nodes}{grow}", [f"it starts {first.starts}, on {first.starts_with} nodes"]
        before = span((later[-1].starts_in or 0.0) - first.starts_in)
        return f"--nodes {first.nodes} --grow", [
            f"it starts {before} before {later[-1].nodes} does, and takes further nodes in as they become free",
            *filter(None, (_pays_off(first, row, scaling) for row in later)),
        ]
    best = min(rows, key=lambda row: row.done_in or 0.0)
    row = next(row for row in rows if (row.done_in or 0.0) <= (best.done_in or 0.0) * (1 + _WORTH))
    fixed, grown = row.done_in or 0.0, first.done_in_grown or 0.0
    if grown < fixed * (1 - _WORTH):
        otherwise = "without further nodes" if further else f"without --grow {row.nodes} is done first,"
        return f"--nodes {first.nodes} --grow", [f"it is done in {span(grown)}; {otherwise} in {span(fixed)}"]
    others = [other for other in (first, last) if other is not row and (other.done_in or 0.0) > fixed * (1 + _WORTH)]
    than = "".join(f", {other.nodes} in {span(other.done_in or 0.0)}" for other in others)
    return f"--nodes {row.nodes}", [f"it is done in {span(fixed)}{than}"]


def _pays_off(first: Row, row: Row, scaling: Scaling) -> str:
    """From which length a training is done earlier if it waits for ``row``."""
    slow, fast = scaling.speed(first.starts_with), scaling.speed(row.starts_with)
    if fast <= slow:
        return ""
    waits = (row.starts_in or 0.0) - (first.starts_in or 0.0)
    length = span(waits * fast / (fast - slow))
    return f"without --grow {row.nodes} is done earlier if the training takes more than {length} on {first.starts_with}"


def table(found: Advice, sizes: Sequence[int], asked: int, now: float) -> RenderableType:
    """``asked``: the number of ``sizes`` that Slurm was asked about."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    shown = ["ask for", "starts", "on", "with"]
    if any(row.done_in is not None for row in found.rows):
        shown += ["done in", "with --grow"]
    for name in shown:
        grid.add_column(name, no_wrap=True)
    for row in found.rows:
        at = "" if row.starts_in is None else clock(now + row.starts_in)[:16]
        nodes = f"{row.starts_with} node{'s' * (row.starts_with > 1)}" if row.starts_with else ""
        done = ["" if time is None else span(time) for time in (row.done_in, row.done_in_grown)]
        grid.add_row(*[row.nodes, row.starts, at, nodes, *done][: len(shown)])
    lines = [Text(f"{row.nodes} is refused: {row.refused}") for row in found.rows if row.refused]
    if found.growth:
        lines.append(Text(f"grows to  {', '.join(map(str, found.growth))}"))
    refusals = dict.fromkeys(grown.refused for grown in found.growth if grown.refused)
    lines += [Text(f"further nodes are refused: {reason}") for reason in refusals]
    lines.append(Text())
    if found.ask_for:
        lines.append(Text.assemble("ask for ", (found.ask_for, "bold")))
    lines += [Text(f"  {sentence}") for sentence in found.why]
    if asked < len(sizes):
        lines.append(Text(f"Slurm was asked about {asked} of the {len(sizes)} sizes, evenly by ratio.", "dim"))
    lines.append(Text(_OF_SLURM, "dim"))
    return Group(grid, *lines)


_OF_SLURM = (
    "The times are Slurm's estimates (sbatch --test-only): running jobs end at their time limits, waiting jobs come "
    "first, one after the other. A job may start earlier, by backfill or where others end early."
)


def as_json(found: Advice, now: float) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {"schema": SCHEMA, "time": now, **asdict(found)}
