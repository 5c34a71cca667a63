"""Which job a command is about: what a user types for JOB."""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic_hpc.errors import UsageError
from elastic_hpc.rundir import RunDir


def add_job(parser: argparse.ArgumentParser) -> None:
    """``args.job`` is its run directory."""
    parser.add_argument("job", metavar="JOB", type=_run_dir)


def _run_dir(text: str) -> RunDir:
    found = next((path for path in (Path(text), Path("elastic-logs", text)) if path.is_dir()), None)
    if not text or found is None:
        raise UsageError(
            f"{text!r}: expected a job's id, where ./elastic-logs has it, or its run directory, "
            "for example elastic-logs/4711"
        )
    return RunDir(found)
