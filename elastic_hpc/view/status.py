"""How jobs are, on a screen. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_hpc.view.job import JobView
from elastic_hpc.view.times import span

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
