"""Checkpoints that are complete or do not exist, saved by any number of ranks of one job, in its latest round."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.record.folders import look_again
from elastic_hpc.training import fences
from elastic_hpc.training.checkpoint_folder import Files, complete

log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointError(ElasticError):
    """A checkpoint was not committed, or no existing checkpoint can be loaded. Raised on all ranks."""


class CheckpointReader:
    """The complete checkpoints in ``folder``, which all ranks must share, for a job that only loads them: an
    evaluation, or a training that starts from the weights of another training. Changes nothing in the folder, in which
    a training may save meanwhile.

    All ranks make the same calls in the same order, as for a collective.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()

    def newest_first(self) -> list[Path]:
        """The paths of the complete checkpoints, newest first, the same on all ranks. Raises CheckpointError if rank 0
        cannot list the folder, or another rank does not see it.
        """
        names = _lead(lambda: complete(self.folder), f"cannot list {self.folder}")
        self._look(".")
        return [self.folder / name for name in names]

    def load(self, loader: Callable[[Path], T]) -> T | None:
        """Load the newest checkpoint that ``loader`` can load on all ranks. Returns what ``loader`` returns, or None if
        there is no checkpoint.

        If ``loader`` raises on any rank, all ranks try the previous checkpoint. If checkpoints were pruned meanwhile,
        all ranks try the newer ones. Raises CheckpointError if no checkpoint loads: then ``loader`` is probably
        wrong, and a training from the beginning would overwrite the checkpoints.
        """
        failure, tried, found = "", set[Path](), self.newest_first()
        while untried := [path for path in found if path not in tried]:
            for path in untried:
                tried.add(path)
                try:
                    with _agree(f"cannot load {path}"):
                        result = loader(path)
                except CheckpointError as error:
                    failure = str(error)
                    if world()[0] == 0:
                        log.warning("%s; trying the one before", failure)
                else:
                    return result
            found = self.newest_first()
            if tried <= set(found):  # none was pruned
                break
        if failure:
            raise CheckpointError(f"{failure}; nor any later one: fix the loader, or start again in another folder")
        return None

    def _look(self, name: str) -> None:
        """Raise CheckpointError unless all ranks see ``name``. Makes NFS ask its server."""
        with _agree(f"{self.folder}: expected a folder that the nodes of all ranks share"):
            look_again(self.folder / name)


class Checkpoints(CheckpointReader):
    """The checkpoints in ``folder``, which all ranks must share; the default is ``checkpoints`` in the job's run
    directory or, without an agent, in the working directory. ``keep``: the number of steps whose checkpoints remain
    after a save, not counting later steps, which the loader must have refused. To load without saving, use
    ``CheckpointReader``.

    All ranks make the same calls in the same order, as for a collective. Create the object after
    ``init_process_group`` and before you read a checkpoint: from then on the folder belongs to this round of this job,
    and what earlier rounds left unfinished is removed.

    Two owners never save at the same time: opening the folder removes the fence of the previous owner, and a worker
    commits a checkpoint only while its own fence exists, even after it was frozen for long. Raises FencedOut, as
    ``save`` does, on a worker of an earlier round or run of the job, and for a folder of another job that is alive. A
    job is alive as long as its leader sends heartbeats to its run directory. If that directory cannot be written or
    read, or without agents, as under plain torchrun, the last job to open the folder owns it, and the next save of the
    previous owner fails. Raises CheckpointError if the folder cannot be used, and UsageError if ``keep`` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, keep: int = 3) -> None:
        if keep < 1:
            raise UsageError(f"Checkpoints(keep={keep}): expected the number of checkpoints to keep, at least 1")
        super().__init__(folder or Path(os.environ.get("ELASTIC_HPC_RUN_DIR", ""), "checkpoints"))
        owner, run_dir = fences.own(os.environ)
        self._files = Files(self.folder, owner, keep, run_dir)
        _lead(self._files.open, f"cannot use {self.folder} for checkpoints")

    @contextlib.contextmanager
    def save(self, step: int) -> Iterator[Path]:
        """Give all ranks the path of one new folder to write into; commit when all ranks have left the block. ``step``:
        the number of steps done.

        One rank may write, or all, as with ``torch.distributed.checkpoint``. Rank 0 syncs the files that it finds in
        the folder; other ranks must sync their own files, as ``torch.distributed.checkpoint`` does. If any rank leaves
        the block with an exception, or the commit fails, nothing is committed and all ranks raise CheckpointError; the
        training may continue without this checkpoint. Saving a step again replaces its checkpoint.
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


def world() -> tuple[int, int]:
    """Rank and world size. Raises UsageError if the launcher has started more ranks, but there is no process group."""
    dist = _distributed()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UsageError(f"WORLD_SIZE is {size}, but the ranks are not connected: call init_process_group() before")
    return 0, 1


def control_group() -> tuple[Any, Any] | None:
    """``torch.distributed`` and a gloo group of all ranks besides the training's group; None if there is one rank.

    All ranks make the group together, at their first call. It ends with the default group: otherwise its threads would
    be alive while Python shuts down (pytorch issue 190489).
    """
    dist = _distributed()
    if dist is None or dist.get_world_size() == 1:
        return None
    if dist.group.WORLD in _share_their_group:
        return dist, dist.group.WORLD
    group = _groups.get(dist.group.WORLD)
    if group is None:
        group = _groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return dist, group


def use_default_group() -> None:
    """From now on use the default group as the control group too: its members change, which no other group can follow.
    The default group must have gloo for tensors on CPUs.
    """
    dist = _distributed()
    _share_their_group.add(dist.group.WORLD)


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_share_their_group: weakref.WeakSet[Any] = weakref.WeakSet()


def _distributed() -> Any:
    """``torch.distributed`` if it is initialised, else None. Does not import it."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


@contextlib.contextmanager
def _agree(failed: str) -> Iterator[None]:
    """Raise CheckpointError on all ranks if the block raised on any rank; the error names the ranks and problems."""
    problem = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - sent to all ranks, raised on all
        problem = error
    report = f"{type(problem).__name__}: {problem}" if problem else None
    reports = [report]
    if control := control_group():
        dist, group = control
        reports = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report, group=group)
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(reports) if text]
    if problems:
        raise CheckpointError(f"{failed}; {'; '.join(problems[:4])}{'; ...' if problems[4:] else ''}") from problem


def _lead(action: Callable[[], T], failed: str) -> T:
    """Run ``action`` on rank 0, and return its result on all ranks. All raise what it raises, as an ElasticError."""
    outcome: list[Any] = [None, None]
    if world()[0] == 0:
        try:
            outcome[0] = action()
        except ElasticError as error:
            outcome[1] = error
        except Exception as error:  # noqa: BLE001 - sent to all ranks, raised on all
            outcome[1] = CheckpointError(f"{failed}; {type(error).__name__}: {error}")
            outcome[1].__cause__ = error
    if control := control_group():
        dist, group = control
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1]:
        raise outcome[1]
    result: T = outcome[0]
    return result
