"""Where this user's jobs have their run directories, so that commands find them from any folder. Reads and writes a
file.

The file is ``$XDG_STATE_HOME/elastic_hpc/jobs``, by default in ``~/.local/state``, and has one run directory per line,
the newest last; a line with ``-`` before it says that the folder was removed. If the file cannot be written, nothing
fails: a job is found by its path too.
"""

from __future__ import annotations

import contextlib
import os
from glob import escape
from pathlib import Path

_READ = 256 * 1024
"""Number of bytes that are read at the end of the file."""
_REMOVED = b"-"


def _file() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(state if os.path.isabs(state) else "~/.local/state").expanduser() / "elastic_hpc" / "jobs"


def remember(run_dir: str | os.PathLike[str]) -> None:
    """Add the run directory of a submitted job, which need not exist yet; for an array, the path before ``_TASK``."""
    _append(os.fsencode(os.path.abspath(run_dir)))


def remember_once(run_dir: Path) -> None:
    """As ``remember``, unless the job, or its array, has been added before."""
    array = run_dir.with_name(run_dir.name.partition("_")[0])
    if not {run_dir, array} & set(remembered()):
        remember(run_dir)


def forget(run_dir: Path) -> None:
    """A run directory was removed."""
    _append(_REMOVED + os.fsencode(run_dir))


def _append(line: bytes) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        file = _file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as jobs:
            jobs.write(line + b"\n")


def remembered() -> list[Path]:
    """The run directories of the jobs that were submitted last, the newest at the end. A folder may not exist yet, or
    may no longer exist; the folder of an array never exists.
    """
    lines: list[bytes] = []
    with contextlib.suppress(OSError, RuntimeError), open(_file(), "rb") as jobs:
        size = os.fstat(jobs.fileno()).st_size
        jobs.seek(max(0, size - _READ))
        lines = jobs.read().split(b"\n")[1 if size > _READ else 0 : -1]
    last = {line.removeprefix(_REMOVED): line for line in lines}  # if a path is in the file twice, its last line counts
    newest = reversed(dict.fromkeys(line.removeprefix(_REMOVED) for line in reversed(lines)))
    return [Path(os.fsdecode(path)) for path in newest if not last[path].startswith(_REMOVED)]


def with_tasks() -> list[Path]:
    """Like ``remembered``, but for an array the run directories of its tasks that have started; each once."""
    found = (run_dir for path in remembered() for run_dir in tasks(path) or [path])
    return list(dict.fromkeys(map(itself, found)))


def itself(run_dir: Path) -> Path:
    """``run_dir``, or the run directory beside it, if ``run_dir`` is a link to that: see ``RunDir.call_also``."""
    return run_dir.with_name(os.path.basename(os.readlink(run_dir))) if os.path.islink(run_dir) else run_dir


def tasks(run_dir: Path) -> list[Path]:
    """The run directories of an array's tasks that have started; ``run_dir``: the array's, which does not exist."""
    if os.path.isdir(run_dir):
        return []
    candidates = run_dir.parent.glob(f"{escape(run_dir.name)}_*")
    found = (path for path in candidates if path.name.removeprefix(f"{run_dir.name}_").isdecimal())
    return sorted(found, key=lambda path: (len(path.name), path.name))
