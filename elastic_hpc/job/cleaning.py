"""Run directories of jobs that ended long ago, and copies of code that no job took: which may be removed. Removes them.

In doubt a folder is kept: another user's, a link, a job that Slurm or the record calls active, a job whose end nobody
knows, and a folder in which the script has written files of its own, such as checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elastic_hpc import slurm
from elastic_hpc.errors import SlurmError
from elastic_hpc.job.look import Jobs, recorded
from elastic_hpc.record.registry import forget
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.state import Observed

_RECORD = {"spec.json", "secret", "verdict.json"}
"""A folder with one of these files is a run directory."""
_OURS = re.compile(
    r"(secret|heartbeat|left|over|once-more|running|resuming|logs|notices|code|script\.sbatch|code\.diff)"
    r"|(spec|endpoint|state|verdict|warning|starts|code|unfit\..*)\.json|events(\..*)?\.jsonl"
    r"|(first|acted|turn|acts|began)\..*|.*\.lock|code.*\.~\d+~|\..*"
)
"""What we write into a run directory. All else is the script's."""
_ENDS = ("verdict.json", "heartbeat", "endpoint.json", "spec.json", "script.sbatch")
"""Files whose latest modification is the end of the job, or later."""

ACTIVE = "active"
UNKNOWN = "of unknown end: neither the record nor Slurm says how they ended; name them to remove them"
FILES = "with files of the script, such as checkpoints; --with-checkpoints removes them too"
FOREIGN = "of another user, or a link, or without a job's record"


@dataclass(frozen=True)
class Leftover:
    """A folder that may be removed."""

    path: Path
    state: str
    """Slurm's word for the end of the job; empty for a copy of code."""
    ended: float
    """Seconds since the epoch."""
    files: tuple[str, ...] = ()
    """Names of what the script has written there."""

    def size(self) -> int:
        """Bytes on the disk."""
        return sum(_sizes(self.path))


@dataclass
class Inventory:
    """What may be removed, and the names of what is kept, by the reason."""

    leftovers: list[Leftover] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, reason: str, path: Path) -> None:
        self.kept.setdefault(reason, []).append(path.name)


def inventory(run_dirs: Sequence[RunDir], before: float, *, named: bool, with_files: bool) -> Inventory:
    """``run_dirs`` of jobs that ended before ``before``. ``named``: the user has named these jobs, and a job of unknown
    end may be removed if Slurm does not know it. Otherwise also copies of code beside them that no job took.
    ``with_files``: also folders with files of the script.
    """
    found, ended, unsure = Inventory(), dict[Path, str](), list[RunDir]()
    old = {rundir.path: when for rundir in run_dirs if (when := _ended(rundir.path)) and when < before}
    active = _asked_once()
    for path in old:
        observed = recorded(RunDir(path)) if _is_ours(path) else None
        if observed is None:
            found.keep(FOREIGN, path)
        elif reason := active(_ids(observed)) if observed.launcher_runs is None else ACTIVE * observed.launcher_runs:
            found.keep(reason, path)
        elif observed.final:
            ended[path] = observed.final
        else:
            unsure.append(RunDir(path))
    for look in Jobs(unsure).look(ends=True) if unsure else ():
        path, is_known = Path(look.view.run_dir), look.view.state != "UNKNOWN"
        if look.view.over and (is_known or named):
            ended[path] = look.view.state
        else:
            found.keep(UNKNOWN if look.view.over else ACTIVE, path)
    for path, state in ended.items():
        files = tuple(sorted(entry.name for entry in os.scandir(path) if not _OURS.fullmatch(entry.name)))
        if files and not with_files:
            found.keep(FILES, path)
        else:
            found.leftovers.append(Leftover(path, state, old[path], files))
    if not named:
        for copy in _copies({rundir.path.parent for rundir in run_dirs}, before):
            # which job waits for it, only Slurm knows: any may
            if reason := active(None):
                found.keep(reason, copy.path)
            else:
                found.leftovers.append(copy)
    return found


def remove(leftover: Leftover) -> None:
    """Remove a folder, and the links by which the job was found under another id too. Raises OSError."""
    if not _is_folder_of_ours(leftover.path):
        raise FileNotFoundError(None, "it has changed", str(leftover.path))
    for entry in list(os.scandir(leftover.path)):  # the record last: what is left of a failure is found again
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
    shutil.rmtree(leftover.path)
    for entry in list(os.scandir(leftover.path.parent)):
        with contextlib.suppress(OSError):
            if entry.is_symlink() and os.readlink(entry.path) == leftover.path.name:
                os.unlink(entry.path)
    forget(leftover.path)


def _asked_once() -> Callable[[Collection[str] | None], str]:
    """A function that says why jobs with these ids, or any jobs for None, count as active; empty if they do not. Slurm
    is asked at the first call.
    """
    live: list[set[str] | str] = []

    def active(ids: Collection[str] | None) -> str:
        if not live:
            try:
                live.append({id.partition("_")[0] for id in slurm.mine()})
            except SlurmError as error:
                live.append(f"of Slurm, which did not answer ({error})")
        (answer,) = live
        if isinstance(answer, str):
            return answer
        return ACTIVE if (answer if ids is None else answer.intersection(ids)) else ""

    return active


def _ids(observed: Observed) -> set[str]:
    """The ids of Slurm jobs that may use the folder, without the number of an array's task or of a step."""
    return {re.split(r"[._]", id)[0] for id in (observed.id, observed.slurm_id)}


def _ended(path: Path) -> float:
    """When the job ended, if it has: at the last sign of it; 0 if there is no such folder."""
    latest = 0.0
    for name in (*_ENDS, "."):
        with contextlib.suppress(OSError):
            if name != "." or not latest:
                latest = max(latest, os.lstat(path / name).st_mtime)
    return latest


def _is_ours(path: Path) -> bool:
    return _is_folder_of_ours(path) and any((path / name).is_file() for name in _RECORD)


def _is_folder_of_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _copies(folders: Collection[Path], before: float) -> Iterator[Leftover]:
    """Copies of code, put aside for jobs that never took them: see ``JobSpec.staged``."""
    for folder in sorted(folders):
        for path in sorted(folder.glob(".submission.*")):
            if _is_folder_of_ours(path) and (when := os.lstat(path).st_mtime) < before:
                yield Leftover(path, "", when)


def _sizes(folder: Path | str) -> Iterator[int]:
    """Of all in ``folder`` that can be seen, without following links."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            yield entry.stat(follow_symlinks=False).st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes(entry.path)
