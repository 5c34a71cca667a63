"""The checkpoints that ``live`` saves, and from which it loads if no worker of the world has trained yet."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable
from pathlib import Path

from elastic_hpc.training.checkpoint import CheckpointError, Checkpoints, world
from elastic_hpc.training.live_state import LiveStates

log = logging.getLogger(__name__)


class LiveCheckpoints:
    """The checkpoints of ``live(checkpoint_every=every, folder=folder, load=load)``. All ranks make the same calls. The
    training needs no checkpoint while a worker has its state: a failure is logged, and the next save tries again.
    """

    def __init__(
        self,
        states: LiveStates,
        every: int | None,
        folder: str | os.PathLike[str] | None,
        load: Callable[[], int | None] | None,
    ) -> None:
        self.every = every
        self._states, self._load = states, load
        self._folder = Path(folder).absolute() if folder else None  # the script may change the working directory
        self._checkpoints: Checkpoints | None = None
        self.saving = False
        self.last = [0, 0]
        """The step of the last checkpoint, and the step of the last attempt to save."""

    @property
    def are_of_script(self) -> bool:
        """Whether the script has checkpoints of its own."""
        return self._load is not None

    def open(self, *, must: bool) -> None:
        """Take over the folder at the start of a world. Raises CheckpointError if it ``must`` succeed and fails."""
        self._checkpoints = None
        if not self.every:
            return
        try:
            self._checkpoints = Checkpoints(self._folder)
        except CheckpointError as error:
            if must:
                raise
            _warn(error)

    def load(self) -> int:
        """Load the newest checkpoint, or the script's own. Returns the number of steps done."""
        if self._load:
            return operator.index(self._load() or 0)
        step = self._checkpoints.load(self._states.load_from) or 0 if self._checkpoints else 0
        self.last = [step, step]
        return step

    def save_if_due(self, step: int) -> None:
        """Save after ``step`` steps if ``every`` steps were done since the last attempt."""
        if not self.every or step // self.every <= self.last[1] // self.every:
            return
        try:
            self._save(step)
        except CheckpointError as error:
            self.last[1] = step
            _warn(error)

    def save_last(self, step: int) -> None:
        """Save before the loop ends. Raises CheckpointError."""
        if self.every and self.last[0] != step:
            self._save(step)

    def _save(self, step: int) -> None:
        self.saving = True
        try:
            self._checkpoints = self._checkpoints or Checkpoints(self._folder)
            with self._checkpoints.save(step) as path:
                if world()[0] == 0:
                    self._states.save_into(path, step)
        finally:
            self.saving = False
        self.last = [step, step]


def _warn(error: CheckpointError) -> None:
    if world()[0] == 0:
        log.warning("%s; the training continues, and tries again when the next checkpoint is due", error)
