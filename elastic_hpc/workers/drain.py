"""How workers are told to save and stop that do not ask whether they are to: by a signal, ``--drain-signal``."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Mapping

from elastic_hpc.options.values import DrainSignal
from elastic_hpc.workers.proc import handles

log = logging.getLogger(__name__)


class DrainSignals:
    """Those of one node, round after round. ``workers``, everywhere, are the ones that live: a pidfd by each pid."""

    def __init__(self, wanted: DrainSignal | None, *, slurm: bool) -> None:
        """``wanted``: None for SIGTERM to each worker that handles it. One that does not would be dead before its next
        checkpoint, and is left to train for as long as there is time. ``slurm``: this is a node of a Slurm job.
        """
        self._wanted = wanted
        self._number = wanted.number if wanted else signal.SIGTERM
        self._slurm = slurm
        self.begin()

    def begin(self) -> None:
        """A round has started."""
        self._told: set[int] = set()
        self._advised = False

    @property
    def told(self) -> bool:
        """Whether a worker of the round was told."""
        return bool(self._told)

    def can_tell(self, workers: Mapping[int, int]) -> bool:
        """Whether there is a worker that the signal would tell, or has told."""
        return self.told or any(map(self._takes, workers))

    def tell(self, workers: Mapping[int, int], got: int = 0) -> None:
        """Send it to those that were not told yet. ``got``: the signal that this agent has got itself, 0 for none: the
        workers have got it too, if it comes from Slurm.
        """
        for pid in workers.keys() - self._told:
            if self._takes(pid):
                self._told.add(pid)
                if not (self._slurm and got == self._number):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(workers[pid], self._number)
            elif self._wanted is None and not self._advised:
                self._advise(pid)

    def _takes(self, pid: int) -> bool:
        return self._number > 0 and (self._wanted is not None or handles(pid, self._number))

    def _advise(self, pid: int) -> None:
        for name in ("USR1", "USR2"):
            if handles(pid, signal.Signals[f"SIG{name}"]):
                self._advised = True
                log.info("the workers handle SIG%s, not SIGTERM: if they save then, type --drain-signal %s", name, name)
