"""A finding of the doctor, and the output made from findings: JSON, and a configuration file. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from elastic_hpc.options.sbatch import Given

_LASTING = frozenset(
    ("account", "constraint", "cpus-per-task", "exclusive", "gpus-per-node", "gres", "mem", "partition", "qos")
)
"""Options of sbatch that belong to the site rather than to one job."""

NAMED = 6
"""The most nodes or pairs of nodes that a finding names; it counts the others."""


class Level(Enum):
    """How much a finding matters, worst first."""

    BAD = "bad"
    """Elastic jobs do not work here."""
    WARN = "warn"
    """Elastic jobs work, and lose more than necessary."""
    UNKNOWN = "unknown"
    """There was no answer; never a good sign."""
    NOTE = "note"
    OK = "ok"


@dataclass(frozen=True)
class Finding:
    """``found``: the value, as Slurm writes it. ``means``: what follows for elastic jobs. ``set``: what to type or set,
    and who must do it.
    """

    level: Level
    about: str
    found: str
    means: str
    set: str = ""
    config: Mapping[str, str | int] = field(default_factory=dict)
    """Lines of a configuration file that follow from the finding."""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    order = list(Level)
    return sorted(findings, key=lambda finding: order.index(finding.level))


def as_json(findings: Sequence[Finding]) -> str:
    """``findings`` for programs, which may rely on the fields of ``schema`` 1."""
    rows = [{**vars(finding), "level": finding.level.value, "config": dict(finding.config)} for finding in findings]
    return json.dumps({"schema": 1, "findings": rows}, indent=1)


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first ``NAMED`` of ``names``, and how many more there are."""
    more = len(names) - NAMED
    return separator.join(names[:NAMED]) + (f"{separator}and {more} more" if more > 0 else "")


def site_file(findings: Iterable[Finding], sbatch: Sequence[Given], log_dir: str | None = None) -> str:
    """A configuration file (see job.config) with the lines that follow from ``findings``, the options of sbatch that
    belong to the site, and ``log_dir``, if given.
    """
    lines = [
        _line(key, value, f"{finding.about}: {finding.found}")
        for finding in findings
        for key, value in finding.config.items()
    ]
    lines += [_line("log-dir", log_dir, "as given to the doctor")] if log_dir else []
    text = ["# Written by elastic-hpc doctor. To use it: export ELASTIC_HPC_CONFIG=THIS-FILE"]
    text += lines or ["# No finding needs a value other than the default."]
    if kept := [given for given in sbatch if given.name in _LASTING]:
        text += ["", "[sbatch]"]
        text += [_line(g.name, True if g.value is None else g.value, "as given to the doctor") for g in kept]
    return "\n".join(text) + "\n"


def _line(key: str, value: str | float, reason: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in reason)
    return f"{key} = {json.dumps(value, ensure_ascii=False)}  # {shown}"
