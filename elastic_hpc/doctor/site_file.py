"""The configuration file that the doctor writes. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from elastic_hpc.doctor.findings import Finding
from elastic_hpc.options.sbatch import Given

_LASTING = frozenset(
    ("account", "constraint", "cpus-per-task", "exclusive", "gpus-per-node", "gres", "mem", "partition", "qos")
)
"""Options of sbatch that belong to the site rather than to one job."""


def site_file(findings: Iterable[Finding], sbatch: Sequence[Given], log_dir: str | None = None) -> str:
    """A configuration file (see job.config) with what follows from ``findings``, with the options of sbatch that belong
    to the site, and with ``log_dir``, if that was given.
    """
    lines = [
        _line(key, value, f"{finding.about}: {finding.found}")
        for finding in findings
        for key, value in finding.config.items()
    ]
    lines += [_line("log-dir", log_dir, "as given to the doctor")] if log_dir else []
    text = ["# Written by elastic-hpc doctor. To use it: export ELASTIC_HPC_CONFIG=THIS-FILE"]
    text += lines or ["# Nothing found here needs other values than the defaults."]
    if kept := [given for given in sbatch if given.name in _LASTING]:
        text += ["", "[sbatch]"]
        text += [_line(g.name, True if g.value is None else g.value, "as given to the doctor") for g in kept]
    return "\n".join(text) + "\n"


def _line(key: str, value: str | float, reason: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in reason)
    return f"{key} = {json.dumps(value, ensure_ascii=False)}  # {shown}"
