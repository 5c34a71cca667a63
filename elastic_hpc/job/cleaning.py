"""Finds and removes run directories of jobs that ended long ago, and copies of code that no job used.

In doubt a folder is kept: a folder of another user, a link, the folder of a job that Slurm or the record calls active,
that wrote a file a moment ago, that is being resumed, or whose end is unknown, and a folder in which the script has
written files of its own, such as checkpoints (``remains``).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.job.look import Jobs, recorded
from elastic_hpc.job.remains import Remains, remains
from elastic_hpc.record.registry import forget
from elastic_hpc.record.rundir import RESUMING, RunDir
from elastic_hpc.view.state import Observed

_ENDS = ("verdict.json", "heartbeat", "endpoint.json", "spec.json", "script.sbatch")
"""Files whose latest modification is the end of the job, or later."""
_MADE = b"\n# made by elastic-sbatch "
"""Bytes in each batch script from a built-in template."""
_REMOVED = ".removed."
"""Begins the name of a folder that is being removed."""
_FRESH, _SILENT = 600.0, 86400.0
"""Seconds since the last file was written. Below ``_FRESH`` a job may be alive, whatever else is known; above
``_SILENT`` a job of unknown end may be removed if the user names it.
"""

ACTIVE = "active"
RECENT = f"whose files were written in the last {_FRESH / 60:.0f} minutes; try again later"
CLAIMED = f"being resumed or removed by another command; if that has died, remove the file {RESUMING} there"
UNKNOWN = "whose end is unknown, to the record and to Slurm: a day later you can remove them by name"
FILES = "with files of the script, such as checkpoints; --with-checkpoints removes them too"
FOREIGN = "of another user"
LINK = "links"
NO_RECORD = "without a job's record or batch script"
UNREADABLE = "that cannot be read completely"


@dataclass(frozen=True)
class Leftover:
    """A folder that may be removed."""

    path: Path
    state: str
    """Slurm's word for the end of the job; ``code`` for a copy of code, ``removed`` for the rest of a removed job."""
    ended: float
    """Seconds since the epoch."""
    files: tuple[str, ...] = ()
    """Names of the files and folders that the script has written there."""

    is_job: bool = True
    """False for a copy of code, and for what is left of a removal."""

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


def inventory(
    run_dirs: Sequence[RunDir], before: float, *, named: bool, with_files: bool, claimed: bool = False
) -> Inventory:
    """Which of ``run_dirs`` may be removed: those whose jobs ended before ``before``. ``named``: the user has named
    these jobs, and a job of unknown end may be removed if Slurm does not know it; if not ``named``, copies of code
    beside them that no job used may be removed too. ``with_files``: so may folders with files of the script.
    ``claimed``: the caller has made the file RESUMING there.
    """
    found, ended, unsure = Inventory(), dict[Path, str](), list[RunDir]()
    old = {rundir.path: when for rundir in run_dirs if (when := _ended(rundir.path)) and when < before}
    active = _asked_once()
    for path in old:
        if reason := _not_ours(path):
            found.keep(reason, path)
            continue
        observed = recorded(RunDir(path))
        if reason := active(_ids(observed)) if observed.launcher_runs is None else ACTIVE * observed.launcher_runs:
            found.keep(reason, path)
        elif not claimed and os.path.lexists(path / RESUMING):
            found.keep(CLAIMED, path)
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
        try:
            there = remains(path)
        except OSError:
            found.keep(UNREADABLE, path)
            continue
        if reason := _reason_to_keep(there, state, with_files=with_files):
            found.keep(reason, path)
        else:
            found.leftovers.append(Leftover(path, state, old[path], there.files))
    if not (named or claimed):
        folders = {rundir.path.parent for rundir in run_dirs}
        for copy in _copies(folders, before):
            # only Slurm knows which job waits for the copy: any active job may
            if reason := active(None):
                found.keep(reason, copy.path)
            else:
                found.leftovers.append(copy)
        for path in _named(folders, _REMOVED):  # a removal that was interrupted
            with contextlib.suppress(OSError):
                there = remains(path)
                if reason := _reason_to_keep(there, "removed", with_files=with_files):
                    found.keep(reason, path)
                else:
                    when = os.lstat(path).st_mtime
                    found.leftovers.append(Leftover(path, "removed", when, there.files, is_job=False))
    return found


def _reason_to_keep(there: Remains, state: str, *, with_files: bool) -> str:
    silent = time.time() - there.written
    if silent < _FRESH:
        return RECENT
    if state == "UNKNOWN" and silent < _SILENT:
        return UNKNOWN
    return FILES if there.files and not with_files else ""


def remove(leftover: Leftover, before: float, *, named: bool, with_files: bool) -> None:
    """Remove a folder, and the links to it, which have other ids of the job as names. Meanwhile the job cannot be
    resumed. Raises OSError, also if ``inventory`` with the same arguments now finds that the folder must stay.
    """
    path = leftover.path
    if not _is_folder_of_ours(path):
        raise FileNotFoundError(None, "it has changed", str(path))
    if not leftover.is_job:
        if not path.name.startswith(_REMOVED) and (reason := _asked_once()(None)):
            raise FileExistsError(None, reason, str(path))
        _remove_renamed(path)
        return
    moved = path.with_name(f"{_REMOVED}{path.name}.{secrets.token_hex(8)}")  # the next removal finds it
    with _claim(path):
        looked_at = os.lstat(path)
        now = inventory([RunDir(path)], before, named=named, with_files=with_files, claimed=True)
        if leftover not in now.leftovers:
            raise FileExistsError(None, ": ".join(["it has changed", *now.kept]), str(path))
        path.rename(moved)
    if not os.path.samestat(looked_at, os.lstat(moved)):
        raise FileExistsError(None, "this folder was put in the place of another", str(moved))
    forget(path)
    for entry in list(os.scandir(path.parent)):
        with contextlib.suppress(OSError):
            if entry.is_symlink() and os.readlink(entry.path) == path.name:
                os.unlink(entry.path)
    _remove_renamed(moved)


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[None]:
    """Keep the job from being resumed. If the body fails, allow it again. Raises OSError."""
    try:
        if not RunDir(path).claim(RESUMING, f"elastic-hpc clean: process {os.getpid()} on {os.uname().nodename}\n"):
            raise FileExistsError(None, "it is being resumed", str(path))
    except ElasticError as error:
        raise PermissionError(None, str(error), str(path)) from None
    try:
        yield
    except BaseException:
        (path / RESUMING).unlink(missing_ok=True)
        raise


def _remove_renamed(path: Path) -> None:
    if not _is_folder_of_ours(path):
        raise FileNotFoundError(None, "it has changed", str(path))
    shutil.rmtree(path)


def _asked_once() -> Callable[[Collection[str] | None], str]:
    """A function that returns why a job with one of these ids, or any job for None, counts as active; empty if none
    does. Its first call asks Slurm.
    """
    live: list[set[str] | str] = []

    def active(ids: Collection[str] | None) -> str:
        if not live:
            try:
                live.append({id.partition("_")[0] for id in slurm.mine()})
            except SlurmError as error:
                live.append(f"because Slurm did not answer ({error})")
        (answer,) = live
        if isinstance(answer, str):
            return answer
        return ACTIVE if (answer if ids is None else answer.intersection(ids)) else ""

    return active


def _ids(observed: Observed) -> set[str]:
    """The ids of Slurm jobs that may use the folder, without the number of an array's task or of a step."""
    ids = {observed.id, observed.slurm_id}
    for path in Path(observed.run_dir).glob("acted.*"):
        with contextlib.suppress(OSError, UnicodeError):
            ids.add(path.read_text())
    return {re.split(r"[._]", id)[0] for id in ids}


def _ended(path: Path) -> float:
    """When the job ended, if it has: the time of its last sign of life; 0 if there is no such folder."""
    latest = 0.0
    for name in (*_ENDS, "."):
        with contextlib.suppress(OSError):
            if name != "." or not latest:
                latest = max(latest, os.lstat(path / name).st_mtime)
    return latest


def _not_ours(path: Path) -> str:
    """Why ``path`` is no run directory of this user; empty if it is. Other programs also write a file spec.json. A job
    that ended before an agent led it has only its batch script.
    """
    rundir = RunDir(path)
    with contextlib.suppress(ElasticError, OSError):
        if not _is_folder_of_ours(path):
            return LINK if path.is_symlink() else FOREIGN
        if (
            {"job", "script"} <= (rundir.read("spec.json") or {}).keys()
            or {"outcome", "run", "actor"} <= (rundir.read("verdict.json") or {}).keys()
            or _MADE in (path / "script.sbatch").read_bytes()
        ):
            return ""
    return NO_RECORD


def _is_folder_of_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _copies(folders: Collection[Path], before: float) -> Iterator[Leftover]:
    """Copies of code, put aside for jobs that never used them: see ``JobSpec.staged``."""
    before = min(before, time.time() - _FRESH)
    for path in _named(folders, ".submission."):
        if (when := os.lstat(path).st_mtime) < before:
            yield Leftover(path, "code", when, is_job=False)


def _named(folders: Collection[Path], begin: str) -> Iterator[Path]:
    for folder in sorted(folders):
        yield from filter(_is_folder_of_ours, sorted(folder.glob(f"{begin}*")))


def _sizes(folder: Path | str) -> Iterator[int]:
    """The sizes of everything in ``folder`` that can be read, without following links."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            yield entry.stat(follow_symlinks=False).st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes(entry.path)
