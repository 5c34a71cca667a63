"""For training scripts: whether to save and stop now. All ranks get the same answer.

The agent of a node creates the file ``drain`` in the folder that it shares with its workers.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading

from elastic_hpc.errors import UsageError
from elastic_hpc.training.checkpoint import control_group
from elastic_hpc.training.departures import own_question
from elastic_hpc.training.progress import ProgressFile, forget_round, meeting_folder, own_progress_file
from elastic_hpc.training.step_time import waiting_for_others

DRAIN_FILE = "drain"


def drain_requested(every: int = 1) -> bool:
    """Whether to save and stop now: the time limit is near, the job is preempted, the world must change, or the user
    has requested it. Once True, always True.

    All ranks get the same answer, and must call this at the same place, for example once a step. Only every
    ``every``-th call asks the other ranks, which costs a round trip among all ranks; the calls between repeat the last
    answer. Before ``init_process_group`` each rank gets an answer of its own.
    """
    if every < 1:
        raise UsageError(f"drain_requested(every={every}): expected a number of calls, at least 1")
    return own_drain().requested(every)


def is_told_to_drain() -> bool:
    """Whether the agent wants the workers of this node to save and stop. Does not ask the other ranks."""
    return own_drain().is_told


@functools.cache
def own_drain() -> Drain:
    return Drain(meeting_folder(), own_progress_file())


def enter_round() -> None:
    """Begin another round in the same process. A SIGTERM that the process has received still counts."""
    terminated = own_drain().terminated
    forget_round()
    own_drain.cache_clear()
    own_question.cache_clear()
    own_drain().terminated = terminated


class Drain:
    """One worker's part in a drain. ``folder``: the folder that it shares with its agent; None without an agent."""

    def __init__(self, folder: str | None, progress: ProgressFile) -> None:
        self.progress = progress
        self._file = os.path.join(folder, DRAIN_FILE) if folder else None
        self._calls = 0
        self._with_agents = True
        """Whether any rank has an agent; True until the ranks have exchanged this."""
        self.terminated = False
        """Whether the worker has received SIGTERM."""
        self._agreed = False
        """Whether all ranks have answered True together; before ``init_process_group`` a rank answers alone."""

    def requested(self, every: int) -> bool:
        """See ``drain_requested``."""
        self._begin()
        if self._agreed:
            return True
        control = control_group() if self._with_agents else None
        if self._calls % every:
            return self.progress.drained and control is None
        return self.ask()[0]

    def ask(self, number: int = 0) -> tuple[bool, int]:
        """Ask all ranks whether to save and stop now. Returns the answer, and the largest ``number`` of all ranks.
        Without any agent, does not ask the other ranks.
        """
        if not self._calls:
            self._begin()
        control = control_group() if self._with_agents else None
        answer = self.progress.drained or self.terminated or self.is_told
        if control:
            dist, group = control
            own = [int(answer), int(self._file is not None), number]
            # long enough that each rank sends and receives, see reform.py; the script may have another default device
            flags = sys.modules["torch"].tensor(own * dist.get_world_size(group), device="cpu")
            with waiting_for_others():
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
            told, with_agents, number = flags[:3].tolist()
            answer, self._with_agents = bool(told), bool(with_agents)
            self._agreed = answer
        if answer and not self.progress.drained:
            self.progress.mark_drained()
        return answer, number

    def _begin(self) -> None:
        self._calls += 1
        if self._calls == 1:
            self.progress.listen()
            self._handle_sigterm()

    @property
    def is_told(self) -> bool:
        return self._file is not None and os.path.exists(self._file)

    def _handle_sigterm(self) -> None:
        """Treat SIGTERM as a drain: Slurm sends it to workers too, at a preemption and at scancel. Keeps a handler that
        the script has set, and does not affect forked processes.
        """
        if self._file is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return

        def on_sigterm(_signum: int, _frame: object) -> None:
            own_drain().terminated = True  # for the current round

        def in_child() -> None:
            if signal.getsignal(signal.SIGTERM) is on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, on_sigterm)
        os.register_at_fork(after_in_child=in_child)
