"""The signal that makes workers save and stop if they do not call ``drain_requested``: ``--drain-signal``."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Mapping

from elastic_hpc.options.values import DrainSignal
from elastic_hpc.workers.proc import handles

log = logging.getLogger(__name__)


class DrainSignals:
    """The signals to the workers of one node, round after round. ``workers``: pidfds of the living workers, by pid."""

    def __init__(self, wanted: DrainSignal | None, *, slurm: bool) -> None:
        """``wanted``: None for SIGTERM to each worker that handles it. SIGTERM would kill a worker without a handler;
        such a worker continues to train for as long as there is time. ``slurm``: this is a node of a Slurm job.
        """
        self._wanted = wanted
        self._number = wanted.number if wanted else signal.SIGTERM
        self._slurm = slurm
        self.begin()

    def begin(self) -> None:
        """A round has started."""
        self._signalled: set[int] = set()
        self._advised = False

    @property
    def sent(self) -> bool:
        """Whether a worker of the round has received the signal."""
        return bool(self._signalled)

    def tell(self, workers: Mapping[int, int], got: int = 0) -> None:
        """Send the signal to the workers that have not received it. ``got``: the signal that this agent has received, 0
        for none. If Slurm has sent that signal, the workers have received it too.
        """
        for pid in workers.keys() - self._signalled:
            if self._takes(pid):
                self._signalled.add(pid)
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
