"""Which files in the run directory of a job that has ended were written by the script, not by us. Reads files."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic_hpc.job.snapshot import LIST, Listed, listed
from elastic_hpc.record.rundir import RESUMING

_MARKS = re.compile(
    r"secret|heartbeat|left|over|once-more|running|resuming|(first|acted|turn|acts)\.[\d._]+|began\.\d+\.[\w.-]+"
    r"|(node\.\d+|host)\.lock"
)
_MOST = 4096
"""The most bytes of a mark: a checkpoint that happens to have the name of a mark is larger."""
_RECORD = r"(spec|endpoint|state|verdict|warning|starts|unfit\.[\w.-]+)\.json"
_FILES = re.compile(
    rf"script\.sbatch|events(\.[\w.-]+)?\.jsonl|code\.(diff|json|files\.json)(\.~\d+~)?|{_RECORD}|\.{_RECORD}\.[\w.-]+"
)
_LOGS = re.compile(
    r"logs/(conclude\.log|\d+\.(agent|again|join)-[^/]+\.log|\d+\.\d+/[^/]+\.(rank[\d,-]+\.log|stacks))"
    r"|notices/\.?segment_health_check\.[^/]+"
)
_CACHE = re.compile(r"code/(.*/)?__pycache__/[^/]+\.pyc")


@dataclass(frozen=True)
class Remains:
    """``files``: what the script has written in the run directory, and what else is not known as ours: relative paths;
    a folder other than ``logs`` and ``code`` stands for all its files. ``written``: when a file was last written, in
    seconds since the epoch.
    """

    files: tuple[str, ...]
    written: float


def remains(run_dir: Path) -> Remains:
    """What is in ``run_dir``, without following links. Raises OSError if a part of it cannot be read."""
    code = {copied for path in run_dir.glob(f"{LIST}*") for copied in _list(path)}
    files, written = set[str](), 0.0
    for name, found in _walk(str(run_dir), ""):
        if name != RESUMING:
            written = max(written, found.st_mtime)
        if not _is_ours(name, found, code):
            top = name.partition("/")[0]
            files.add(name if top in {"logs", "code"} else top)
    return Remains(tuple(sorted(files)), written)


def _is_ours(name: str, found: os.stat_result, code: set[Listed]) -> bool:
    if name.startswith("code/") and (listed(name.removeprefix("code/"), found) in code or _CACHE.fullmatch(name)):
        return True
    if not stat.S_ISREG(found.st_mode):
        return False
    if _MARKS.fullmatch(name):
        return found.st_size <= _MOST
    return bool(_FILES.fullmatch(name) or _LOGS.fullmatch(name))


def _list(path: Path) -> Iterator[Listed]:
    with suppress(ValueError, TypeError):  # damaged: all in code/ counts as the script's
        yield from [(str(name), int(size), int(when)) for name, size, when in json.loads(path.read_text())]


def _walk(folder: str, begin: str) -> Iterator[tuple[str, os.stat_result]]:
    """Everything except folders, by its path in the run directory."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = begin + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, f"{name}/")
            else:
                yield name, entry.stat(follow_symlinks=False)
