"""A folder of checkpoints that are complete or do not exist, in which one owner at a time can save.

In it, for a job JOB in its run 0 and round 7:

``step-00000120``               complete, the rename to this name is the commit; ``step-00000120.1`` if saved once more
``.tmp-step-00000120.JOB.0.7``  being written
``.pruned.JOB.0.7``             checkpoints that the round prunes are renamed into this folder
``.fence.JOB.0.7``              the fence: no other owner has taken the folder over; contains the job's run directory
``.trash-...``                  being deleted; no owner uses this name

An owner always takes the folder over from earlier rounds of its own job, which it knows by their numbers. It takes the
folder over from another job when that job has ended (``fences.living``). That check is a courtesy, and may be wrong
about a frozen node. The fence alone ensures that no two owners save.

A worker may be frozen at any place, for any time, and then continue; hence the order. To open: create the own fence,
remove the fences of the others, list the folder, check that the own fence still exists, rename the listed ``.tmp`` and
``.pruned`` of the others away, and only then list the checkpoints. To write: create the ``.tmp``, fill it, and only
then check the own fence and rename. Either the ``.tmp`` of a late writer was there to be renamed away, and then its
commit came before the listing or fails; or the late writer made its ``.tmp`` later, when its fence was gone already.
Complete checkpoints are never replaced, and pruning is a rename into a folder that can be renamed away, so the same
holds for pruning. The only condition is a file system on which all nodes see renames in one order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from elastic_hpc.training import fences
from elastic_hpc.training.fences import FencedOut, Owner

log = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_OWNED = re.compile(r"\.(tmp-step-\d+|pruned|fence)\.(.+\.\d+\.\d+)")


class Files:
    """What rank 0 does to the folder. Raises FencedOut, and OSError."""

    def __init__(self, folder: Path, owner: Owner, keep: int, run_dir: str = "") -> None:
        """``run_dir``: the run directory of the owner's job; empty without an agent."""
        self._folder, self._owner, self._keep, self._run_dir = folder, owner, keep, run_dir
        self._fence = folder / f".fence.{owner}"

    def open(self) -> None:
        """Take the folder over from earlier rounds of this job, and from jobs that have ended. Raises FencedOut, and
        changes nothing, if a later round or a job that is alive owns the folder.
        """
        os.makedirs(self._folder, exist_ok=True)
        for left in (2, 1, 0):
            self._take_over()
            try:
                self._sweep(lambda owner: owner != str(self._owner))
            except FencedOut:  # another job has opened the folder, and may have lost its fence too
                if not left:
                    raise
            else:
                return

    def _take_over(self) -> None:
        before = self._others()
        written = fences.run_dirs({other: path for other, path in before.items() if other.job != self._owner.job})
        if (alive := fences.living(written)) is not None:
            raise FencedOut(
                f"{self._folder} belongs to {fences.names([alive])}, which is alive ({alive}): wait until that job has "
                "ended, or give this job a folder of its own; to load without saving use CheckpointReader"
            )
        if written and (steps := complete(self._folder)):
            log.warning(
                "%s has checkpoints of %s, the newest of step %d: this job continues from them",
                self._folder,
                fences.names(written.values()),
                _parse(steps[0])[0],
            )
        self._set_fence()
        try:
            others = self._others()
            self._give_way(others.keys() - before.keys())
        except FencedOut:
            self._fence.unlink(missing_ok=True)
            raise
        for path in others.values():
            path.unlink(missing_ok=True)

    def begin(self, step: int) -> str:
        """Name of a new, empty folder for ``step``."""
        self._sweep(lambda owner: owner == str(self._owner))  # left by saves that failed
        name = f".tmp-step-{step:08d}.{self._owner}"
        os.mkdir(self._folder / name)
        try:
            self._check()  # commit checks too; checked here, a worker that is fenced out writes nothing
        except FencedOut:
            self.discard(name)
            raise
        return name

    def commit(self, step: int, name: str) -> None:
        """Make the folder that ``begin`` named the newest checkpoint of ``step``, then prune."""
        taken = [again for other, again in map(_parse, complete(self._folder)) if other == step]
        final = f"step-{step:08d}" + (f".{max(taken) + 1}" if taken else "")
        try:
            _sync_all(self._folder / name)
            self._check()
            os.rename(self._folder / name, self._folder / final)
        except FileNotFoundError:
            self._check()
            raise
        _sync(self._folder)
        try:
            self._prune(step)
        except OSError as error:
            log.warning("cannot prune old checkpoints: %s", error)

    def discard(self, name: str) -> None:
        """Rename ``name`` away at once, then delete it. It may be gone already."""
        trash = self._folder / f".trash-{os.urandom(8).hex()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._folder / name, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _sweep(self, whose: Callable[[str], bool]) -> None:
        """Discard what the owners that ``whose`` selects have begun and not finished, but nothing of a later owner:
        that owner removes the fence of this owner before it begins anything.
        """
        names = os.listdir(self._folder)
        self._check()
        for name in names:
            owned = _OWNED.fullmatch(name)
            if name.startswith(".trash-") or (owned and owned[1] != "fence" and whose(owned[2])):
                self.discard(name)

    def _prune(self, step: int) -> None:
        kept: set[int] = set()
        old = []
        for name in complete(self._folder):
            other, _ = _parse(name)
            if other > step:
                continue  # the loader refused it: otherwise the training would have continued from it
            if other in kept or len(kept) == self._keep:
                old.append(name)
            kept.add(other)
        if not old:
            return
        grave = self._folder / f".pruned.{self._owner}"
        os.mkdir(grave)
        self._check()
        for name in old:
            os.rename(self._folder / name, grave / name)
        self.discard(grave.name)

    def _give_way(self, rivals: Collection[Owner]) -> None:
        """Of jobs that open the folder at the same moment, the one with the lowest name stays."""
        if any(rival < self._owner for rival in rivals if rival.job != self._owner.job):
            raise FencedOut(f"{self._folder}: another job has opened the folder at the same moment; give each its own")

    def _set_fence(self) -> None:
        descriptor = os.open(self._fence, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            with contextlib.suppress(OSError):  # the disk is full: other jobs will believe that this job has ended
                os.write(descriptor, os.fsencode(self._run_dir))
        finally:
            os.close(descriptor)
        _sync(self._folder)

    def _check(self) -> None:
        """Raise FencedOut unless the own fence exists."""
        try:
            os.close(os.open(self._fence, os.O_RDONLY))  # unlike stat, open asks an NFS server
        except FileNotFoundError:
            jobs = fences.names(fences.run_dirs(self._others()).values()) or "another job"
            raise FencedOut(f"{self._folder}: {jobs} has opened the folder; give each job its own") from None

    def _others(self) -> dict[Owner, Path]:
        """All fences of other owners. Raises FencedOut if one belongs to a later round of this job."""
        found = [owned for owned in map(_OWNED.fullmatch, os.listdir(self._folder)) if owned and owned[1] == "fence"]
        others = {Owner.parse(owned[2]): self._folder / owned[0] for owned in found if owned[2] != str(self._owner)}
        for other in others:
            if self._owner.precedes(other):
                raise FencedOut(
                    f"{self._folder}: opened by round {other.round} of run {other.run + 1} of this job; this is round "
                    f"{self._owner.round} of run {self._owner.run + 1} and may not save any more"
                )
        return others


def complete(folder: Path) -> list[str]:
    """Names of the complete checkpoints in ``folder``, newest first: by step, then by when the step was saved."""
    return sorted(filter(_COMPLETE.fullmatch, os.listdir(folder)), key=_parse, reverse=True)


def _parse(name: str) -> tuple[int, int]:
    found = _COMPLETE.fullmatch(name)
    assert found
    return int(found[1]), int(found[2] or 0)


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            (_sync_all if entry.is_dir() else _sync)(folder / entry.name)
    _sync(folder)
