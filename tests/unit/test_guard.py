"""The guard of an agent, with real processes: it kills the remaining processes of a dead agent, and those that a frozen
agent no longer controls.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_hpc.workers import guard

AGENT = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
from elastic_hpc.workers import guard
theirs, pipe = os.pipe()
argv = [sys.executable, "-I", "-S", guard.__file__, *{argv!r}]
watcher = subprocess.Popen(argv, stdin=theirs, start_new_session=True)
os.close(theirs)
print(watcher.pid, flush=True)
sys.stdin.readline()
while True:
    guard.beat(pipe)
    time.sleep(0.1)
"""
WORKER = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, b'up\\n')
time.sleep(600)
"""


class Agent:
    """A process that starts a guard as an agent does, and sends beats on request."""

    def __init__(self, *argv: str, job: str | None = None) -> None:
        """``job``: the Slurm job of the process."""
        self.token = secrets.token_hex(8)
        code = AGENT.format(root=str(Path(guard.__file__).parents[1]), argv=[self.token, *argv])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=in_job(job)
        )
        assert self.process.stdout
        self.guard = int(self.process.stdout.readline())
        self.left: list[subprocess.Popen[bytes]] = []

    def beats(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def worker(self, job: str | None = None) -> subprocess.Popen[bytes]:
        """A running, marked process in a session of its own, in the Slurm job ``job``."""
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**in_job(job), "ELASTIC_HPC_AGENT": self.token},
            start_new_session=True,
            stdout=subprocess.PIPE,
        )
        self.left.append(worker)
        assert worker.stdout
        assert worker.stdout.read(3) in {b"up\n", b""}  # nothing if it was killed before
        return worker

    def stop(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: state(pid) == "T")  # type: ignore[misc]

    def end(self) -> None:
        for pid in (self.process.pid, self.guard):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in (*self.left, self.process):
            process.kill()
            process.communicate()


def in_job(job: str | None) -> dict[str, str]:
    """The environment of a process of the Slurm job ``job``, or of a process outside of any job."""
    environ = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    return environ | ({"SLURM_JOB_ID": job} if job else {})


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(happened: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lives_on(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether ``process`` lives for ``seconds``. Returns as soon as the process ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is None


@pytest.fixture
def start() -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def made(*argv: str, job: str | None = None) -> Agent:
        agents.append(Agent(*argv, job=job))
        return agents[-1]

    yield made
    for agent in agents:
        agent.end()


@pytest.mark.parametrize("argv", [(), ("0.8",)])
def test_the_remaining_processes_of_a_dead_agent_are_killed(start: Callable[..., Agent], argv: tuple[str, ...]) -> None:
    agent = start(*argv)
    agent.beats()
    worker, innocent = agent.worker(), start().worker()
    os.kill(agent.guard, signal.SIGTERM)  # Slurm's warning hits the guard too
    agent.process.kill()
    assert worker.wait(10) == -signal.SIGKILL
    assert innocent.poll() is None
    ended = os.pidfd_open(agent.guard) if Path(f"/proc/{agent.guard}").exists() else None
    if ended is not None:
        assert select.select([ended], [], [], 10)[0]
        os.close(ended)


def test_another_slurm_job_that_a_worker_has_submitted_to_the_node_is_not_killed(start: Callable[..., Agent]) -> None:
    agent = start(job="4711")
    workers = [agent.worker("4711"), agent.worker()]  # a script may hide Slurm from a library
    submitted, of_an_array = agent.worker("47"), agent.worker("47110")
    agent.process.kill()
    assert [worker.wait(10) for worker in workers] == [-signal.SIGKILL] * 2
    guard = Path(f"/proc/{agent.guard}")
    wait_until(lambda: not guard.exists() or state(agent.guard) == "Z")
    assert (submitted.poll(), of_an_array.poll()) == (None, None)


def test_without_slurm_the_token_alone_counts(start: Callable[..., Agent]) -> None:
    agent = start()
    worker = agent.worker("4711")  # a script may set this for a library
    agent.process.kill()
    assert worker.wait(10) == -signal.SIGKILL


def test_the_workers_of_a_frozen_agent_are_killed_and_the_workers_that_it_starts_later_live(
    start: Callable[..., Agent],
) -> None:
    agent = start("0.8")
    agent.beats()
    worker = agent.worker()
    assert lives_on(worker, 2.0)  # an agent that beats is not touched
    frozen = time.monotonic()
    agent.stop(agent.process.pid)
    assert worker.wait(10) == -signal.SIGKILL
    took = time.monotonic() - frozen
    assert 0.5 < took < 3
    assert agent.worker().wait(10) == -signal.SIGKILL  # for example started just before the agent froze
    os.kill(agent.process.pid, signal.SIGCONT)
    wait_until(lambda: state(agent.process.pid) in "SR")
    wait_until(lambda: lives_on(agent.worker(), 1.5))
    assert agent.process.poll() is None


def test_without_a_limit_a_frozen_agent_keeps_its_workers(start: Callable[..., Agent]) -> None:
    agent = start()
    agent.beats()
    worker = agent.worker()
    agent.stop(agent.process.pid)
    assert lives_on(worker, 2.0)


def test_an_agent_that_has_not_beaten_yet_is_not_frozen(start: Callable[..., Agent]) -> None:
    agent = start("0.5")
    worker = agent.worker()
    agent.stop(agent.process.pid)  # the agent imports torch
    assert lives_on(worker, 2.0)


def test_a_guard_that_was_frozen_itself_kills_no_process(start: Callable[..., Agent]) -> None:
    """The whole node was paused: agent and guard continue at the same time."""
    agent = start("1.0")
    agent.beats()
    worker = agent.worker()
    assert lives_on(worker, 0.5)
    for _ in range(2):
        agent.stop(agent.guard, agent.process.pid)
        assert lives_on(worker, 1.8)
        os.kill(agent.guard, signal.SIGCONT)  # the guard continues first
        wait_until(lambda: state(agent.guard) == "S")
        os.kill(agent.process.pid, signal.SIGCONT)
        assert lives_on(worker, 1.2)


def test_if_only_the_guard_was_frozen_it_finds_the_missed_beats(start: Callable[..., Agent]) -> None:
    agent = start("1.0")
    agent.beats()
    worker = agent.worker()
    agent.stop(agent.guard)
    assert lives_on(worker, 2.0)
    os.kill(agent.guard, signal.SIGCONT)
    assert lives_on(worker, 2.0)


def test_a_beat_never_waits_and_never_fails() -> None:
    theirs, ours = os.pipe()
    for _ in range(100_000):  # more than a pipe holds
        guard.beat(ours)
    os.close(theirs)
    guard.beat(ours)  # after the guard was killed
    os.close(ours)
    guard.beat(ours)


def test_the_guard_is_small(start: Callable[..., Agent]) -> None:
    agent = start("5")
    agent.beats()
    status = Path(f"/proc/{agent.guard}/status")
    wait_until(lambda: state(agent.guard) == "S")
    private = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    assert private < [8 * 1024]  # KiB


def test_an_agent_that_stays_frozen_is_killed_and_the_guard_ends_with_it(start: Callable[..., Agent]) -> None:
    """Otherwise the agent would keep its job step, and with it the job, forever."""
    agent = start("0.4", "", "2.0")
    agent.beats()
    worker = agent.worker()
    frozen = time.monotonic()
    agent.stop(agent.process.pid)
    assert worker.wait(10) == -signal.SIGKILL
    assert agent.process.poll() is None
    assert agent.process.wait(10) == -signal.SIGKILL
    assert time.monotonic() - frozen > 1.5
    wait_until(lambda: not Path(f"/proc/{agent.guard}").exists() or state(agent.guard) == "Z")


def test_an_agent_that_wakes_up_in_time_is_not_killed(start: Callable[..., Agent]) -> None:
    agent = start("0.4", "", "3.0")
    agent.beats()
    for _ in range(2):
        agent.stop(agent.process.pid)
        assert lives_on(agent.process, 1.5)
        os.kill(agent.process.pid, signal.SIGCONT)
        wait_until(lambda: lives_on(agent.worker(), 0.8))
