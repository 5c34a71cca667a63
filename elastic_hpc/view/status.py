"""Jobs on a screen: several as a table, one as a card; and a job in a notebook. Pure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_hpc.slurm.states import WAITS
from elastic_hpc.view.job import JobView
from elastic_hpc.view.times import count, span

STYLES: Mapping[str, str] = {
    "RUNNING": "green",
    "COMPLETED": "green",
    "PENDING": "yellow",
    "UNKNOWN": "bold red",
    "FAILED": "red",
    "CANCELLED": "red",
}


def table(views: Sequence[JobView], width: int = 120) -> RenderableType:
    """All jobs, a line each, and their notes below. Leaves out columns that have no room in ``width``."""
    columns: dict[str, list[str]] = {
        "job": [view.id for view in views],
        "state": [view.state for view in views],
        "nodes": [_nodes(view) for view in views],
        "step": [_number(view.step) for view in views],
        "left": ["" if view.time_left is None else span(view.time_left) for view in views],
        "goodput": [_percent(view.goodput) for view in views],
        "restarts": [_of(view.restarts, view.max_restarts) for view in views],
        "script": [view.script[:24] for view in views],
        "lost": [span(view.lost) if view.lost else "" for view in views],
        "steps/s": [_number(view.steps_per_second, ".2f") for view in views],
        "round": [str(view.round or "") for view in views],
    }  # the most important first
    table = Table(box=None, pad_edge=False, header_style="bold")
    used = 0
    for name, values in columns.items():
        needed = max(map(len, [name, *values])) + 2
        if any(values) and (used + needed <= width + 2 or not used):
            used += needed
            table.add_column(name, justify="left" if name in {"job", "state", "script"} else "right", no_wrap=True)
        else:
            columns[name] = []
    for row in zip(*filter(None, columns.values()), strict=True):
        table.add_row(row[0], *(Text(cell, STYLES.get(cell, "")) for cell in row[1:]))
    notes = [
        Text.assemble((view.id, "bold"), f" {view.note.splitlines()[0]}", _starts(view) and f"; starts {_starts(view)}")
        for view in views
        if view.note and view.state != "COMPLETED"
    ]
    return Group(table, *([Text()] if notes else []), *notes)


def _nodes(view: JobView) -> str:
    limits = "" if view.min_nodes is None else f" of {view.min_nodes}:{view.max_nodes}"
    return f"{len(view.nodes)}{limits}" if view.nodes or limits else ""


def _of(count: int, most: int | None) -> str:
    return str(count) if most is None else f"{count} of {most}"


def _number(value: float | None, how: str = "d") -> str:
    return "" if value is None else format(value, how)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _starts(view: JobView) -> str:
    return "" if view.starts_in is None else f"in {span(view.starts_in)}, as Slurm estimates"


def _speeds(view: JobView) -> str:
    """The speeds and the scaling efficiency, if there are two sizes to compare."""
    if len(view.speeds) < 2:
        return ""
    least = min(view.speeds)
    return ", ".join(
        f"{count(nodes, 'node')} {speed:.2f} steps/s"
        + (f" (efficiency {view.efficiency[nodes]:.0%})" if nodes > least else "")
        for nodes, speed in view.speeds.items()
    )


def first_nodes(nodes: Sequence[str]) -> str:
    return " ".join(nodes[:16]) + (" ..." if len(nodes) > 16 else "")


def card(view: JobView) -> RenderableType:
    """One job on a screen."""
    head = Text.assemble(
        ("job ", "bold"), (view.id, "bold"), "  ", (view.state, STYLES.get(view.state, "bold")), "  ", view.script
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column()
    for name, text in {**({"": view.note} if view.note else {}), **_facts(view)}.items():
        rows.add_row(name, Text(text))
    return Group(head, rows)


def html_card(view: JobView) -> str:
    """One job in a notebook."""
    return html_table(
        {"job": f"{view.id} {view.script}", "state": view.summary, **_facts(view), "advice": "; ".join(view.advice)}
    )


def _facts(view: JobView) -> dict[str, str]:
    """The facts about a job besides its state, each with the label of its line."""
    facts: dict[str, str] = {}

    def row(name: str, *parts: str) -> None:
        if shown := ", ".join(filter(None, parts)):
            facts[name] = shown

    row("in Slurm", view.slurm_id if view.slurm_id != view.id and view.slurm_id[:1].isdecimal() else "")
    if view.state in WAITS:
        row("starts", _starts(view) or "unknown: Slurm has no estimate yet")
    joined = f"{view.joiners} by jobs of their own" if view.joiners else ""
    row("nodes", _nodes(view), first_nodes(view.nodes), joined)
    row("missing", *(f"{node}: {why}" for node, why in [*view.missing.items()][:4]), "..." * (len(view.missing) > 4))
    row("slow", *(f"{node}: {times:g} times as long as the others" for node, times in view.slow.items()))
    row(
        "workers",
        str(view.world_size) if view.world_size else "",
        f"round {view.round}",
        f"{view.workers_kept} in place, with the process of the round before" * bool(view.workers_kept),
        f"leader {view.leader}" * bool(view.leader),
    )
    row("restarts", _of(view.restarts, view.max_restarts), f"last: {view.last_restart}" if view.last_restart else "")
    row(
        "requeues",
        _of(view.requeues, view.max_requeues) + " after failures",
        f"{max(0, view.runs - 1 - view.resumed)} in all",
        f"resumed {count(view.resumed, 'time')}" if view.resumed else "",
    )
    speed = "" if view.steps_per_second is None else f"{view.steps_per_second:.2f} steps/s"
    speed = speed if view.no_step_for is None else f"no step for {span(view.no_step_for)}"
    row(
        "step",
        "not reported" if view.step is None else str(view.step),
        speed,
        "" if view.loss is None else f"loss {view.loss:.4g}",
    )
    row("speed", _speeds(view))
    left = "" if view.time_left is None else f"{span(view.time_left)} left"
    row(
        "time",
        f"ran {span(view.running)}" if view.running else "",
        f"queued {span(view.queued)}" if view.queued else "",
        left,
    )
    repeated = f"{count(view.repeated_steps, 'step')} repeated" if view.repeated_steps else ""
    row(
        "lost",
        span(view.lost) if view.lost else "no time",
        repeated,
        f"goodput {_percent(view.goodput)}" * (view.goodput is not None),
    )
    if view.hang_timeout is not None and not view.over:
        row("hung after", f"{span(view.hang_timeout)} without a step or output ({view.hang_timeout_reason})")
    row("record", view.run_dir, f"entries that could not be understood: {view.damaged}" if view.damaged else "")
    return facts


def html_table(rows: Mapping[str, str]) -> str:
    """The rows that are not empty."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items() if text
    )
    return f"<table>{cells}</table>"
