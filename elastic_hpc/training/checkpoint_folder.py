"""A folder of checkpoints that are complete or do not exist, in which only the latest round of a job can save.

In it, for a job JOB in its round 7:

``step-00000120``             complete, the rename to this name is the commit; ``step-00000120.1`` if saved once more
``.tmp-step-00000120.JOB.r7`` being written
``.pruned.JOB.r7``            checkpoints that the round prunes are renamed into this folder
``.fence.JOB.r7``             the fence: no later round has opened the folder
``.trash-...``                being deleted; no round uses this name

A worker may sleep at any place for any time and then go on, hence the order. To open: set up the own fence, remove the
fences of the rounds before, rename their ``.tmp`` and ``.pruned`` away, and only then list. To write: make the
``.tmp``, fill it, and only then look for the own fence and rename. A late writer's ``.tmp`` either was there to be
renamed away, and then its commit came before the listing or fails; or was made later, when its fence was gone already.
Complete checkpoints are never replaced, and pruning is a rename into a folder that can be renamed away, so the same
holds for pruning. The only condition is a file system on which all nodes see renames in one order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from elastic_hpc.errors import ElasticError

log = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_OWNED = re.compile(r"\.(tmp-step-\d+|pruned|fence)\.(.*)\.r(\d+)")


class FencedOut(ElasticError):
    """A later round of the job has opened the folder: this worker is a leftover and may not save. Let it end."""


class Files:
    """What rank 0 does to the folder. Raises FencedOut, and OSError."""

    def __init__(self, folder: Path, job: str, round: int, keep: int, *, fenced: bool = True) -> None:
        self._folder = folder
        self._job, self._round, self._fenced = quote(job, safe="")[:100], round, fenced
        self._owner = f"{self._job}.r{round}"
        self._keep = keep

    def open(self) -> None:
        """Fence out the rounds of this job before this one, and all rounds of other jobs: the last to open may save."""
        os.makedirs(self._folder, exist_ok=True)
        if not self._fenced:
            return
        fence = self._folder / f".fence.{self._owner}"
        os.close(os.open(fence, os.O_WRONLY | os.O_CREAT, 0o600))
        _sync(self._folder)
        try:
            before = self._fences_before()
        except FencedOut:
            fence.unlink(missing_ok=True)
            raise
        for name in before:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._folder / name)
        self._sweep(self._is_before)

    def begin(self, step: int) -> str:
        """Name of a new, empty folder for ``step``."""
        self._sweep(lambda owned: (owned[2], int(owned[3])) == (self._job, self._round))  # left by saves that failed
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
        taken = [again for other, again in map(_parse, self.complete()) if other == step]
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

    def complete(self) -> list[str]:
        """Names of the complete checkpoints, newest first: by step, then by when the step was saved."""
        return sorted(filter(_COMPLETE.fullmatch, os.listdir(self._folder)), key=_parse, reverse=True)

    def discard(self, name: str) -> None:
        """Rename ``name`` away at once, then delete it. It may be gone already."""
        trash = self._folder / f".trash-{os.urandom(8).hex()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._folder / name, trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _sweep(self, whose: Callable[[re.Match[str]], bool]) -> None:
        for name in os.listdir(self._folder):
            owned = _OWNED.fullmatch(name)
            if name.startswith(".trash-") or (owned and owned[1] != "fence" and whose(owned)):
                self.discard(name)

    def _prune(self, step: int) -> None:
        kept: set[int] = set()
        old = []
        for name in self.complete():
            other, _ = _parse(name)
            if other > step:
                continue  # refused by the loader, or training would have gone on from it
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

    def _check(self) -> None:
        """Raise FencedOut unless the own fence exists."""
        if not self._fenced:
            return
        fence = self._folder / f".fence.{self._owner}"
        try:
            os.close(os.open(fence, os.O_RDONLY))  # unlike stat, open asks an NFS server
        except FileNotFoundError:
            self._fences_before()
            raise FencedOut(
                f"{self._folder}: {fence.name} is gone, another job has opened the folder; give each job its own"
            ) from None

    def _fences_before(self) -> list[str]:
        """Names of the fences of rounds before this one. Raises FencedOut if there is one of a later round."""
        found = [owned for owned in map(_OWNED.fullmatch, os.listdir(self._folder)) if owned and owned[1] == "fence"]
        for owned in found:
            if owned[2] == self._job and int(owned[3]) > self._round:
                raise FencedOut(
                    f"{self._folder}: opened by round {owned[3]} of this job; this is round {self._round} and may not "
                    f"save any more; if the rounds were made to count from 1 again, remove {owned[0]} there"
                )
        return [owned[0] for owned in found if self._is_before(owned)]

    def _is_before(self, owned: re.Match[str]) -> bool:
        return owned[2] != self._job or int(owned[3]) < self._round


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
