"""Checkpoints that are whole or not there: saved by any number of ranks, never by a worker of a round that is over.

In the folder, for a job JOB in its round 7:

``step-00000120``             complete, the rename to this name is the commit; ``step-00000120.1`` if saved once more
``.tmp-step-00000120.JOB.r7`` being written
``.pruned.JOB.r7``            what the round prunes goes through here
``.fence.JOB.r7``             the fence: no later round has opened the folder
``.trash-...``                out of everybody's reach, being deleted

A worker may sleep at any place for any time and then go on, hence the order. Who opens: put up the own fence, take down
those of the rounds before, rename their ``.tmp`` and ``.pruned`` away, and only then list. Who writes: make the
``.tmp``, fill it, and only then look for the own fence and rename. A late writer's ``.tmp`` was either there to be
renamed away, and then its commit came before the listing or fails; or it was not, and then its fence was down before.
Nobody replaces a complete checkpoint, and pruning is a rename into a folder that can be renamed away, so the same holds
for them. All it takes is a file system on which all nodes see renames in one order.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from elastic_hpc.errors import ElasticError, UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")

_COMPLETE = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_OWNED = re.compile(r"\.(tmp-step-\d+|pruned|fence)\.(.*)\.r(\d+)")


class CheckpointError(ElasticError):
    """A checkpoint was not committed, or none of those that exist can be loaded. Raised on all ranks alike."""


class FencedOut(ElasticError):
    """A later round of the job has opened the folder: this worker is a leftover and may not save. Let it end."""


class Checkpoints:
    """The checkpoints in ``folder``, which all ranks must share; by default in the job's run directory, else here.

    Every call is for all ranks together, like a collective: the same calls in the same order. Making it comes after
    ``init_process_group`` and before any reading; it removes what earlier rounds left unfinished. ``keep``: how many
    steps are kept after a save, not counting later ones, which a loader must have refused. This and ``save`` raise
    FencedOut on a worker whose round is over; without ELASTIC_HPC_ROUND, as under torchrun, nobody is fenced out.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, keep: int = 3) -> None:
        if keep < 1:
            raise UsageError(f"Checkpoints(keep={keep}): expected the number of checkpoints to keep, at least 1")
        self.folder = Path(folder or Path(os.environ.get("ELASTIC_HPC_RUN_DIR", ""), "checkpoints")).absolute()
        round = os.environ.get("ELASTIC_HPC_ROUND")
        job = os.environ.get("TORCHELASTIC_RUN_ID", "") if round else "none"
        self._files = Files(self.folder, job, int(round or 0), keep, fenced=bool(round))
        _lead(self._files.open, f"cannot use {self.folder} for checkpoints")

    @contextlib.contextmanager
    def save(self, step: int) -> Iterator[Path]:
        """A new folder on all ranks, the same one, to write into; committed when all have left the block.

        One rank may write, or all, as with ``torch.distributed.checkpoint``. What rank 0 finds in it is synced; other
        ranks sync their own files, as that one does. If any rank leaves with an exception, or the commit fails,
        nothing is committed and all raise CheckpointError: training may go on without this checkpoint. Saving a step
        again replaces it.
        """
        if step < 0:
            raise UsageError(f"save({step}): expected the number of steps done, at least 0")
        failed = f"no checkpoint of step {step} in {self.folder}"
        name = _lead(lambda: self._files.begin(step), failed)
        self._look(name)
        try:
            with _agree(failed):
                yield self.folder / name
        except CheckpointError:
            if world()[0] == 0:
                self._files.discard(name)
            raise
        _lead(lambda: self._files.commit(step, name), failed)

    def newest_first(self) -> list[Path]:
        """The complete checkpoints, the same on all ranks."""
        names = _lead(self._files.complete, f"cannot list {self.folder}")
        self._look(".")
        return [self.folder / name for name in names]

    def load(self, loader: Callable[[Path], T]) -> T | None:
        """What ``loader`` makes of the newest checkpoint that it can load on all ranks; None if there is no checkpoint.

        Where it raises on any rank, all ranks go to the one before. Raises CheckpointError if none of them loads:
        that is rather a fault of the loader, and starting from nothing would end in overwriting them.
        """
        failure = ""
        for path in self.newest_first():
            try:
                with _agree(f"cannot load {path}"):
                    result = loader(path)
            except CheckpointError as error:
                failure = str(error)
                if world()[0] == 0:
                    log.warning("%s; trying the one before", failure)
            else:
                return result
        if failure:
            raise CheckpointError(f"{failure}; nor any later one: mend the loader, or start anew in another folder")
        return None

    def _look(self, name: str) -> None:
        """Raises CheckpointError unless all ranks see ``name``; has NFS look again."""
        with _agree(f"{self.folder}: expected a folder that the nodes of all ranks share"):
            os.scandir(self.folder / name).close()


class Files:
    """What rank 0 does to the folder. Raises FencedOut, and OSError."""

    def __init__(self, folder: Path, job: str, round: int, keep: int, *, fenced: bool = True) -> None:
        self._folder = folder
        self._job, self._round, self._fenced = quote(job, safe="")[:100], round, fenced
        self._owner = f"{self._job}.r{round}"
        self._keep = keep

    def open(self) -> None:
        """Shut out all rounds before this one. Of another job, that is any round: who opens last has the folder."""
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
            self._check()  # commit does it too: this one saves the trouble of writing
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
        """Names of the complete checkpoints, newest first: by step, and of one step that which was saved last."""
        return sorted(filter(_COMPLETE.fullmatch, os.listdir(self._folder)), key=_parse, reverse=True)

    def discard(self, name: str) -> None:
        """Take ``name`` out of everybody's reach at once, then delete it. Gone already is fine."""
        trash = self._folder / f".trash-{secrets.token_hex(8)}"
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
        """Raises FencedOut unless the own fence stands."""
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


def world() -> tuple[int, int]:
    """Rank and world size. Raises UsageError where the launcher says that there are others, but nothing joins them."""
    dist = _distributed()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UsageError(f"WORLD_SIZE is {size}, but the ranks are not connected: call init_process_group() before")
    return 0, 1


def control_group() -> tuple[Any, Any] | None:
    """``torch.distributed`` and a gloo group of all ranks, apart from the training's; None if there is one rank.

    All ranks make it together, at their first call. It ends with the default group: kept any longer, its threads would
    be alive while Python shuts down (pytorch issue 190489).
    """
    dist = _distributed()
    if dist is None or dist.get_world_size() == 1:
        return None
    group = _groups.get(dist.group.WORLD)
    if group is None:
        group = _groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return dist, group


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _distributed() -> Any:
    """``torch.distributed`` if it is initialised, else None: who has not imported it, has not initialised it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


@contextlib.contextmanager
def _agree(failed: str) -> Iterator[None]:
    """Raises CheckpointError on all ranks if the block raised on any, saying on which and what."""
    problem = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - told to all ranks, raised on all
        problem = error
    told = f"{type(problem).__name__}: {problem}" if problem else None
    everybody = [told]
    if control := control_group():
        dist, group = control
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, told, group=group)
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(everybody) if text]
    if problems:
        raise CheckpointError(f"{failed}; {'; '.join(problems[:4])}{'; ...' if problems[4:] else ''}") from problem


def _lead(action: Callable[[], T], failed: str) -> T:
    """What ``action`` returns on rank 0, on all ranks; or what it raises, a CheckpointError if it is not ours."""
    outcome: list[Any] = [None, None]
    if world()[0] == 0:
        try:
            outcome[0] = action()
        except ElasticError as error:
            outcome[1] = error
        except Exception as error:  # noqa: BLE001 - told to all ranks, raised on all
            outcome[1] = CheckpointError(f"{failed}; {type(error).__name__}: {error}")
            outcome[1].__cause__ = error
    if control := control_group():
        dist, group = control
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1]:
        raise outcome[1]
    result: T = outcome[0]
    return result
