"""Scripts that do not check for a drain but have signal handlers of their own get a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_hpc.errors import UsageError
from elastic_hpc.options.values import DrainSignal
from elastic_hpc.record.events import EventReader
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.workers.drain import DrainSignals
from elastic_hpc.workers.proc import handles

SRUN, TOOL = (Path(sys.executable).with_name(name) for name in ("elastic-srun", "elastic-hpc"))
TRAIN = """
import os, signal, sys, threading, time
import torch, torch.distributed as dist
from pathlib import Path
from elastic_hpc.training import report_progress
run, rank, how = Path(os.environ["ELASTIC_HPC_RUN_DIR"]), int(os.environ["RANK"]), sys.argv[1]
number = getattr(signal, sys.argv[2])
got = os.open(run / f"got.{rank}", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)
signal.set_wakeup_fd(got)  # written to also within a collective

def save(*_):
    while rank == 1 and how != "first" and not (run / "got.0").stat().st_size:  # rank 0 can no longer miss the signal
        time.sleep(0.01)
    time.sleep(0.2 * (1 - rank))  # rank 1 is gone while rank 0 still saves
    (run / f"saved.{rank}").touch()
    if how == "exits":
        os._exit(0)
    if how == "dies":
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    if how == "code":
        sys.exit(128 + number)
    if how == "raises":
        raise RuntimeError("time to go")

if how != "ignorant" and (how != "first" or rank == 0):
    signal.signal(number, save if how != "first" else lambda *_: (save(), os._exit(0)))
if os.environ["ELASTIC_HPC_ROUND"] == "2":
    sys.exit(0)
dist.init_process_group("gloo")
while True:
    dist.all_reduce(torch.ones(1))
    (run / f"steps.{rank}").touch()
    report_progress(1)
    time.sleep(0.02)
"""


class Run:
    """A running ``elastic-srun --local 2``."""

    def __init__(self, folder: Path, how: str, name: str, *options: str) -> None:
        script = folder / "train.py"
        script.write_text(TRAIN)
        self.dir = folder / "run"
        self.output = folder / "output"
        command = [SRUN, "--local=2", "--nodes=2", *options, f"--run-dir={self.dir}", script, how, name]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        self.wait_for(lambda: all((self.dir / f"steps.{rank}").exists() for rank in (0, 1)))

    def wait_for(self, happened: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < end, self.output.read_text()
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def agents(self) -> list[int]:
        """The pids of the workers."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def drain(self) -> dict[str, Any]:
        """Request a drain. Returns the verdict."""
        subprocess.run([TOOL, "drain", self.dir], check=True, timeout=60)
        assert self.process.wait(60) == 1, self.output.read_text()
        verdict: dict[str, Any] = json.loads((self.dir / "verdict.json").read_text())
        return verdict

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in self.dir.glob("saved.*"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def started(*args: str) -> Run:
        runs.append(Run(tmp_path, *args))
        return runs[-1]

    yield started
    for run in runs:
        while run.process.poll() is None:
            run.process.terminate()
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("how", "name", "options", "saved"),
    [
        ("exits", "SIGTERM", (), 2),
        ("dies", "SIGTERM", (), 2),
        ("code", "SIGTERM", (), 2),
        ("raises", "SIGTERM", (), 2),
        ("first", "SIGTERM", (), 1),
        ("exits", "SIGUSR1", ("--drain-signal", "usr1"), 2),
        ("dies", "SIGUSR2", ("--drain-signal=SIGUSR2",), 2),
        ("ignorant", "SIGTERM", ("--drain-signal=15",), 0),
    ],
)
def test_a_script_that_saves_in_a_handler_is_notified_of_a_drain_and_has_time_to_save(
    start: Callable[..., Run], how: str, name: str, options: tuple[str, ...], saved: int
) -> None:
    run = start(how, name, *options)
    verdict = run.drain()
    assert "the workers saved and stopped" in verdict["reason"], run.output.read_text()
    assert (verdict["restarts"], verdict["failure"]) == (0, None)
    assert run.saved == ["saved.0", "saved.1"][:saved]


@pytest.mark.parametrize(
    ("how", "name", "options"),
    [("ignorant", "SIGTERM", ()), ("exits", "SIGUSR2", ()), ("exits", "SIGTERM", ("--drain-signal=off",))],
)
def test_a_script_that_a_signal_would_only_kill_trains_until_the_grace_ends(
    start: Callable[..., Run], how: str, name: str, options: tuple[str, ...]
) -> None:
    run = start(how, name, "--grace=2", *options)
    assert "the workers did not stop within 2 s (--grace)" in run.drain()["reason"]
    assert run.saved == []
    advice = "the workers handle SIGUSR2, not SIGTERM: if they save then, type --drain-signal USR2"
    assert (advice in run.output.read_text()) == (name == "SIGUSR2")


def test_agents_that_get_sigterm_stay_until_the_verdict_even_if_the_script_ignores_the_signal(
    start: Callable[..., Run],
) -> None:
    """As at a preemption without a warning: an agent that left first would count as a lost node."""
    run = start("ignorant", "SIGTERM", "--grace=2")
    for pid in run.agents():
        os.kill(pid, signal.SIGTERM)
    assert run.process.wait(60) == 1, run.output.read_text()
    verdict = json.loads((run.dir / "verdict.json").read_text())
    assert (verdict["cause"], verdict["restarts"]) == ("terminated", 0)
    assert "the workers did not stop within 2 s" in verdict["reason"]
    assert "lost" not in {event["event"] for event in EventReader(run.dir).read()}


def test_ctrl_c_lets_a_script_save_in_its_handler(start: Callable[..., Run]) -> None:
    run = start("code", "SIGTERM")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130
    assert "stopped by the user; the workers saved and stopped" in run.output.read_text()
    assert run.saved == ["saved.0", "saved.1"]


def test_before_a_growth_a_script_saves_in_its_handler_and_the_new_round_does_not_count_as_a_failure(
    start: Callable[..., Run],
) -> None:
    run = start("code", "SIGTERM", "--nodes=2:3")  # the last option counts
    command = os.fsdecode(Path(f"/proc/{run.agents()[0]}/cmdline").read_bytes()).split("\0")[:-1]
    environ = {**os.environ, "ELASTIC_HPC_LOCAL_NODE": "2", "ELASTIC_HPC_LOCAL_NODES": "3"}
    with subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True) as third:
        try:
            assert run.process.wait(60) == 0, run.output.read_text()
        finally:
            third.terminate()
    events = RunDir(run.dir).events()
    assert [event["world_size"] for event in events if event["event"] == "round"] == [2, 3]
    assert [event["reason"] for event in events if event["event"] == "restart"] == ["1 more node(s) joined"]
    assert "failure" not in {event["event"] for event in events}
    assert run.saved == ["saved.0", "saved.1"]


@pytest.mark.parametrize("text", ["TERM", "SIGTERM", "sigterm", "term", "15"])
def test_signals_have_the_same_names_as_in_sbatch(text: str) -> None:
    assert DrainSignal.parse(text) == DrainSignal(signal.SIGTERM)
    assert str(DrainSignal.parse(text)) == "SIGTERM"


def test_with_off_no_signal_is_sent() -> None:
    assert str(DrainSignal.parse("off")) == "off"


@pytest.mark.parametrize("text", ["KILL", "9", "STOP", "0", "TERMINATE", "", "USR1@90", "-15", "SIGSIGTERM", "99"])
def test_a_value_that_is_no_signal_with_a_handler_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match="expected a signal that a process can handle, for example --drain-signal USR1"
    ):
        DrainSignal.parse(text)


WAITS = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
threading.Thread(target=lambda: (up(), signal.sigwait({signal.SIGTERM}), got())).start()
"""
HANDLES = "signal.signal(signal.SIGTERM, lambda *_: got()); up(); signal.pause()"
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); up(); signal.pause()"
DIES = "up(); signal.pause()"
PROCESS = "import os, signal, threading\ndef up(): print('up', flush=True)\ndef got(): os._exit(7)\n"


@pytest.fixture
def process() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    made: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen([sys.executable, "-c", PROCESS + code], stdout=subprocess.PIPE))
        assert made[-1].stdout
        assert made[-1].stdout.readline() == b"up\n"
        return made[-1]

    yield start
    for one in made:
        one.kill()
        one.communicate()


@pytest.mark.parametrize(("code", "ends"), [(WAITS, 7), (HANDLES, 7), (IGNORES, None), (DIES, None)])
def test_the_agent_checks_whether_a_process_has_a_handler(
    process: Callable[[str], subprocess.Popen[bytes]], code: str, ends: int | None
) -> None:
    one = process(code)
    signals, workers = DrainSignals(None, slurm=False), {one.pid: os.pidfd_open(one.pid)}
    assert handles(one.pid, signal.SIGTERM) == bool(ends)
    signals.tell(workers)
    assert signals.sent == bool(ends)
    assert (one.wait(10) if ends else one.poll()) == ends
    os.close(workers[one.pid])


def test_a_signal_that_slurm_has_sent_to_the_workers_is_not_repeated(
    process: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    one = process(HANDLES)
    workers = {one.pid: os.pidfd_open(one.pid)}
    signals = DrainSignals(None, slurm=True)
    signals.tell(workers, got=signal.SIGTERM)
    signals.tell(workers)
    assert signals.sent
    os.kill(one.pid, 0)
    assert one.poll() is None
    signals.begin()
    signals.tell(workers, got=signal.SIGINT)
    assert one.wait(10) == 7
    os.close(workers[one.pid])
