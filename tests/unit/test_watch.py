"""The agent's view of its workers' progress, with real files and real stopped processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cluster import wait_for

from elastic_hpc.membership.hangs import Signs
from elastic_hpc.membership.slow import NO_PACE, Pace
from elastic_hpc.training.drain import Drain
from elastic_hpc.training.progress import LOCAL_DIR, PROGRESS_FILE, ProgressFile
from elastic_hpc.workers import watch
from elastic_hpc.workers.proc import is_stopped
from elastic_hpc.workers.watch import Watch

HANG = timedelta(seconds=100)


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def run(self, seconds: float, seen: Watch) -> None:
        """Let ``seconds`` pass while the agent looks every second."""
        for _ in range(int(seconds)):
            self.now += 1
            seen.look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch, "time", made)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOCAL_DIR, str(tmp_path))
    return tmp_path


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as started:
        yield started
        with contextlib.suppress(ProcessLookupError):
            started.kill()


def watching(workers: int = 2, **options: Any) -> Watch:
    made = Watch(options.get("hang", HANG), options.get("stop", 5.0), options.get("written", int))
    made.start([os.getpid()] * workers)
    return made


def worker(folder: Path, rank: int) -> Drain:
    return Drain(str(folder), ProgressFile(str(folder), str(rank)))


def test_before_any_report_there_is_no_step(folder: Path) -> None:
    seen = watching()
    seen.look()
    assert seen.progress[:3] == (-1, False, False)


def test_the_step_is_that_of_the_most_advanced_worker(folder: Path) -> None:
    seen = watching()
    worker(folder, 0).progress.step(4)
    worker(folder, 1).progress.step(7)
    seen.look()
    assert seen.progress.step == 7


def test_a_step_keeps_the_alarm_off_and_a_missing_step_raises_it(folder: Path, clock: Clock) -> None:
    seen, told = watching(), worker(folder, 0)
    for step in range(5):
        clock.run(90, seen)
        told.progress.step(step)
        seen.look()
        assert seen.trouble() is None
    clock.run(99, seen)
    assert seen.trouble() is None
    clock.run(2, seen)
    trouble = seen.trouble()
    assert trouble
    assert (trouble.kind, trouble.pid) == ("hang", os.getpid())
    assert trouble.message == "no progress after step 4 for 100 s (--hang-timeout)"


def test_output_counts_only_where_no_steps_are_reported(folder: Path, clock: Clock) -> None:
    written = iter(range(10, 10000, 10))
    seen = watching(written=lambda: next(written))
    clock.run(300, seen)
    assert seen.trouble() is None
    worker(folder, 0).progress.step(1)
    seen.look()
    clock.run(101, seen)
    assert seen.trouble()


def test_silent_workers_that_report_no_steps_hang(folder: Path, clock: Clock) -> None:
    seen = watching()
    seen.look()
    clock.run(101, seen)
    trouble = seen.trouble()
    assert trouble
    assert trouble.message == "no output for 100 s (--hang-timeout)"


def test_without_a_hang_timeout_no_worker_counts_as_hanging(folder: Path, clock: Clock) -> None:
    seen = watching(hang=None)
    clock.run(1000, seen)
    assert seen.trouble() is None


def test_time_in_which_the_agent_was_stopped_with_its_workers_does_not_count(folder: Path, clock: Clock) -> None:
    seen = watching()
    seen.look()
    clock.now += 3600  # as with scontrol suspend
    seen.look()
    assert seen.trouble() is None
    assert seen.signs.silent <= 10
    clock.run(98, seen)
    assert seen.trouble()


def test_the_leader_learns_since_when_there_is_no_sign_of_life(folder: Path, clock: Clock) -> None:
    output = [0]
    seen, told = watching(written=lambda: output[0]), worker(folder, 0)
    clock.run(10, seen)
    assert seen.signs == Signs(silent=10, idle=10, unreported=10, reports=0, span=-1, start=0)
    output[0] = 80
    seen.look()
    clock.run(3, seen)
    assert seen.signs == Signs(silent=3, idle=3, unreported=13, reports=0, span=0, start=0)
    told.progress.step(1)
    seen.look()
    clock.run(5, seen)
    assert seen.signs == Signs(silent=5, idle=5, unreported=5, reports=1, span=3, start=13)
    told.progress.step(1)
    seen.look()
    assert seen.signs.silent == 0, "a report of the same step is a sign too, as in an evaluation"


@pytest.mark.parametrize(("doing", "silent", "idle"), [("idle", 100, 100), ("busy", 100, 30), ("blocked", 30, 30)])
def test_the_agent_counts_what_silent_workers_do(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, doing: str, silent: float, idle: float
) -> None:
    monkeypatch.setattr(watch.Work, "look", lambda _work, _seconds: doing)
    seen = watching()
    clock.run(100, seen)
    assert (seen.signs.silent, seen.signs.idle) == pytest.approx((silent, idle), abs=1)


def test_workers_that_wait_for_a_device_for_more_than_an_hour_hang(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.Work, "look", lambda _work, _seconds: "blocked")
    monkeypatch.setattr(watch, "_BLOCKED_AT_MOST", 200.0)
    seen = watching()
    clock.run(330, seen)
    assert seen.signs.silent == pytest.approx(130, abs=1)


def test_a_new_round_starts_without_any_sign_of_life(folder: Path, clock: Clock) -> None:
    seen, told = watching(), worker(folder, 0)
    told.progress.step(9)
    told.requested(1)
    seen.look()
    assert (seen.progress.step, seen.progress.listens) == (9, True)
    clock.now += 500
    (folder / PROGRESS_FILE.format(local_rank=0)).unlink()
    seen.start([os.getpid()])
    assert (seen.progress.step, seen.progress.listens, seen.progress.drained, seen.trouble()) == (
        -1,
        False,
        False,
        None,
    )


def test_between_rounds_no_worker_is_in_trouble(folder: Path, clock: Clock) -> None:
    seen = watching()
    seen.stop()
    clock.run(500, seen)
    assert seen.trouble() is None


def test_a_worker_reads_the_drain_file_and_the_agent_sees_its_answer(folder: Path) -> None:
    seen, told = watching(), worker(folder, 1)
    assert not told.requested(1)
    seen.look()
    assert (seen.progress.listens, seen.progress.drained) == (True, False)
    (folder / "drain").touch()
    assert told.requested(1)
    seen.look()
    assert (seen.progress.listens, seen.progress.drained) == (True, True)


def test_a_stopped_process_is_in_trouble_after_a_while_unless_it_continues(
    folder: Path, clock: Clock, process: subprocess.Popen[bytes]
) -> None:
    seen = Watch(None, 5.0)
    seen.start([os.getpid(), process.pid])
    seen.look()
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(process.pid))
    seen.look()
    clock.now += 4
    assert seen.trouble() is None
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: not is_stopped(process.pid))
    seen.look()
    clock.now += 4
    assert seen.trouble() is None, "it went on in between"
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(process.pid))
    seen.look()
    clock.run(6, seen)
    trouble = seen.trouble()
    assert trouble
    assert (trouble.kind, trouble.pid, trouble.message) == (
        "stopped",
        process.pid,
        "stopped by a signal for 5 s (SIGSTOP)",
    )


def test_a_process_that_is_gone_is_not_stopped(folder: Path, clock: Clock, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    seen = Watch(None, 5.0)
    seen.start([process.pid])
    seen.look()
    clock.now += 100
    seen.look()
    assert seen.trouble() is None


def test_the_pace_of_a_node_is_that_of_its_slowest_worker_when_all_workers_are_measured(
    folder: Path, clock: Clock
) -> None:
    seen, workers = watching(), [worker(folder, rank).progress for rank in range(2)]

    def step(*times: float | None) -> Pace:
        for told, seconds in zip(workers, times, strict=True):
            if seconds is not None:
                told.took(seconds)
            told.step(told.reported + 1)
        clock.run(1, seen)
        return seen.pace

    assert step(None, None) == NO_PACE
    assert step(0.25, None) == NO_PACE
    assert step(0.25, 0.5) == Pace(1, 0.5)
    for _ in range(20):
        step(0.25, 0.5)
    assert step(9.0, 0.5) == Pace(22, 0.5), "a step that takes long now and then does not count"
    seen.stop()
    assert seen.pace == NO_PACE
