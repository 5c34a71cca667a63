"""A finding of the doctor, and how findings are written for programs. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

NAMED = 6
"""How many of many nodes or pairs a finding names; the others are counted."""


class Level(Enum):
    """How much a finding matters; the worst comes first."""

    BAD = "bad"
    """Elastic jobs do not work here."""
    WARN = "warn"
    """They work, and lose more than they must."""
    UNKNOWN = "unknown"
    """It could not be found out; never a good sign by itself."""
    NOTE = "note"
    OK = "ok"


@dataclass(frozen=True)
class Finding:
    """``found``: the value, as Slurm writes it. ``means``: for elastic jobs. ``set``: what to type or set, and who."""

    level: Level
    about: str
    found: str
    means: str
    set: str = ""
    config: Mapping[str, str | int] = field(default_factory=dict)
    """Lines of a configuration file that follow from it."""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    order = list(Level)
    return sorted(findings, key=lambda finding: order.index(finding.level))


def as_json(findings: Sequence[Finding]) -> str:
    """Versioned: a reader may rely on what ``schema`` 1 has."""
    rows = [{**vars(finding), "level": finding.level.value, "config": dict(finding.config)} for finding in findings]
    return json.dumps({"schema": 1, "findings": rows}, indent=1)


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first ``NAMED`` of ``names``, and how many more there are."""
    more = len(names) - NAMED
    return separator.join(names[:NAMED]) + (f"{separator}and {more} more" if more > 0 else "")
