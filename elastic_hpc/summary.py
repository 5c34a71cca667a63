"""The story of a job from its run directory: rounds, world sizes, causes, and what each restart cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Round:
    """One formation of the world. Times are seconds since the epoch."""

    number: int
    run: int
    nodes: tuple[str, ...]
    world_size: int
    restarts: int
    formed: float
    ended: float | None
    cause: str
    """What ended it, empty while it runs."""
    gap: float | None
    """Seconds from what ended the round before, or from the start of the run, to the forming of this one."""


def rounds(events: list[dict[str, Any]]) -> list[Round]:
    """The rounds in ``events`` (``RunDir.events``), oldest first."""
    found: list[Round] = []
    current: Round | None = None
    broken: float | None = None
    run = 0
    for event in events:
        when = event["time"]
        match event["event"]:
            case "start":
                run, broken = event["run"], when
            case "failure":
                broken = broken or when
            case "lost" if current:
                broken = broken or when - event["silent"]
            case "restart" | "verdict" if current:
                broken = broken or when
                found.append(replace(current, ended=broken, cause=event["reason"]))
                current = None
            case "round":
                current = Round(
                    number=event["round"],
                    run=run,
                    nodes=tuple(event["nodes"]),
                    world_size=event["world_size"],
                    restarts=event["restarts"],
                    formed=when,
                    ended=None,
                    cause="",
                    gap=when - broken if broken else None,
                )
                broken = None
    return [*found, current] if current else found


def render(events: list[dict[str, Any]]) -> Any:
    """The rounds as a rich table."""
    from rich.table import Table

    table = Table(title="rounds", title_justify="left")
    for name in ("round", "run", "nodes", "workers", "restart", "formed after", "lasted", "ended by"):
        table.add_column(name, justify="left" if name in {"nodes", "ended by"} else "right")
    for one in rounds(events):
        table.add_row(
            str(one.number),
            str(one.run),
            " ".join(one.nodes),
            str(one.world_size),
            str(one.restarts),
            "" if one.gap is None else f"{one.gap:.2f} s",
            "" if one.ended is None else f"{one.ended - one.formed:.1f} s",
            one.cause or "still running",
        )
    return table
