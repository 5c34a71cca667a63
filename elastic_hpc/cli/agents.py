"""The agents that elastic-srun starts, and what a signal such as Ctrl-C does to them."""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal
import subprocess
import time
from types import FrameType

from elastic_hpc.agent.threads import start
from elastic_hpc.cli import entry
from elastic_hpc.environment import AGENT_MARK
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.record.folders import is_there
from elastic_hpc.record.rundir import RunDir

_TICK = 2.0
"""Seconds between two checks for the verdict."""

_LEAVE, _LAST = 40.0, 5.0
"""Seconds after the verdict within which the agents leave (``assembly.LEAVE``), and seconds after each signal within
which it ends them.
"""


_SAME = 0.5
"""Seconds within which a repeated signal is the same request: ``timeout`` and other programs that start elastic-srun
pass a signal on even if the terminal or ``timeout`` has also sent it to elastic-srun directly.
"""


class _VerdictClock:
    """The time since this process noticed the verdict of this run, which a leader may withdraw. A file system that
    hangs does not block the caller.
    """

    def __init__(self, rundir: RunDir) -> None:
        self._look = functools.partial(is_there, rundir.path / "verdict.json")
        self._answer = start(self._look)
        self._noticed_at: float | None = None

    def age(self) -> float:
        """Seconds since this process noticed the verdict; negative while there is no verdict."""
        if self._answer.done():
            if not self._answer.exception():
                self._noticed_at = (self._noticed_at or time.monotonic()) if self._answer.result() else None
            self._answer = start(self._look)
        return -1.0 if self._noticed_at is None else time.monotonic() - self._noticed_at


def _end_with_parent() -> None:
    """Call this in a process that was just forked: it gets SIGTERM when its parent dies, for any reason. This ends a
    run that a worker has started: agents and srun have their own sessions, so the end of the worker's session does not
    kill them.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Agents:
    """The running agents, and what Ctrl-C does to them. Signals are recorded as they come, and handled in ``wait``, so
    that one signal does not interrupt the handling of another.
    """

    def __init__(self, rundir: RunDir, commands: list[tuple[list[str], dict[str, str]]]) -> None:
        self._rundir = rundir
        self._signals: list[int] = []
        self._signalled = 0.0
        self._handled = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, self._on_signal)
        # sessions of their own: Ctrl-C reaches only this process, which requests an orderly stop from the leader
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, environ in commands:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=environ,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                        preexec_fn=_end_with_parent if AGENT_MARK in os.environ else None,  # noqa: PLW1509 - no threads
                    )
                )
        except OSError as error:
            self._end()
            raise SlurmError(f"{commands[0][0][0]}: {error.strerror}; is Slurm's module loaded?") from None

    @property
    def interrupted(self) -> bool:
        return signal.SIGINT in self._signals

    def wait(self) -> None:
        """Wait until all agents have left. Signals end agents that have not left some time after the verdict, for
        example because they are frozen. Agents that do not end then, for example on a dead node, are left behind.
        """
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        left = {os.pidfd_open(process.pid): process for process in self._processes}
        for pidfd in left:
            poll.register(pidfd, select.POLLIN)
        verdict = _VerdictClock(self._rundir)
        stages = [(_LEAVE, subprocess.Popen.terminate), (_LEAVE + _LAST, subprocess.Popen.kill)]
        while left:
            self.handle_signals()
            for ready, _ in poll.poll(_TICK * 1000):
                if ready == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    poll.unregister(ready)
                    left.pop(ready).wait()
                    os.close(ready)
            age = verdict.age()
            if left and stages and age > stages[0][0]:
                entry.tell("elastic-srun", f"{age:.0f} s after the verdict not all agents have left: they are ended")
                end = stages.pop(0)[1]
                for process in left.values():
                    end(process)
            elif left and age > _LEAVE + 2 * _LAST:
                entry.tell("elastic-srun", "agents that cannot be killed are left behind")
                return

    def handle_signals(self) -> None:
        while self._handled < len(self._signals):
            self._handled += 1
            self._stop(self._handled)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signals and self._signals[-1] == signum and now - self._signalled < _SAME:
            return
        self._signals.append(signum)
        self._signalled = now
        os.eventfd_write(self._wake, 1)
        if len(self._signals) > 2:
            self._end()

    def _stop(self, count: int) -> None:
        """Do what the first or second signal requests."""
        if count > 2:
            return
        hint = "the workers may save first; once more to stop them at once" if count == 1 else "once more to kill"
        entry.tell("elastic-srun", f"stopping; {hint}")
        from elastic_hpc.network.client import ask_leader

        try:
            ask_leader(self._rundir, "save-and-stop" if count == 1 else "stop")
        except ElasticError:
            self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
