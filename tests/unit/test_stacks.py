"""The stacks of stuck processes, read from real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_hpc.workers import stacks

STUCK = """
import threading
def wait_for_a_lost_peer(lock):
    print("up", flush=True)
    lock.acquire()
def load_samples(event):
    event.wait()
threading.Thread(target=load_samples, args=[threading.Event()], name="loader", daemon=True).start()
lock = threading.Lock()
lock.acquire()
wait_for_a_lost_peer(lock)
"""
needs_py_spy = pytest.mark.skipif(stacks._py_spy() is None, reason="py-spy is not installed")


@pytest.fixture
def stuck() -> Iterator[list[int]]:
    """Two processes that wait forever."""
    processes = [subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.communicate()


@needs_py_spy
def test_the_stacks_of_all_threads_are_written(stuck: list[int], tmp_path: Path) -> None:
    path = tmp_path / "stacks" / "n1.stacks"
    assert stacks.dump({"rank0": stuck[0], "rank1": stuck[1]}, path)
    first, second = path.read_text().split("rank1\n")
    for text, pid in zip((first.removeprefix("rank0\n"), second), stuck, strict=True):
        assert str(pid) in text
        assert "wait_for_a_lost_peer (<string>:" in text
        assert "load_samples" in text


@needs_py_spy
def test_a_process_that_was_stopped_shows_its_stack_and_stays_stopped(stuck: list[int], tmp_path: Path) -> None:
    os.kill(stuck[0], signal.SIGSTOP)
    os.waitid(os.P_PID, stuck[0], os.WSTOPPED)
    path = tmp_path / "n1.stacks"
    assert stacks.dump({"rank0": stuck[0]}, path)
    assert "wait_for_a_lost_peer (<string>:" in path.read_text()
    assert "State:\tT" in Path(f"/proc/{stuck[0]}/status").read_text()


def test_without_py_spy_the_kernels_view_and_a_hint_are_written(
    stuck: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "n1.stacks"
    assert stacks.dump({"rank0": stuck[0]}, path)
    text = path.read_text()
    assert "wait_for_a_lost_peer" in text.splitlines()[1]  # matches the command line
    assert text.count(", system call ") == 2
    assert "futex" in text
    assert "pip install py-spy" in text


@needs_py_spy
def test_if_tracing_is_refused_the_kernels_view_reports_that(stuck: list[int]) -> None:
    """Tracing of other users' processes is refused, as yama refuses that of a user's own."""
    needed = (*Path(__file__).resolve().parents, *Path(sys.base_prefix).resolve().parents)
    private = [path for path in needed if not path.stat().st_mode & 0o001]
    if private and os.geteuid() == 0:
        pytest.skip(f"another user cannot pass through {private[-1].name}")
    pid = stuck[0] if os.geteuid() == 0 else 1
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        code = f"""
import os
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
from pathlib import Path
from elastic_hpc.workers.stacks import dump
print(dump({{"rank0": {pid}}}, Path({folder!r}, "n1.stacks")))
"""
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout.strip() == "True", done.stderr
        text = Path(folder, "n1.stacks").read_text()
    assert f"Thread {pid}" in text
    assert "permission denied; sysctl kernel.yama.ptrace_scope=0" in text


def test_a_py_spy_that_hangs_costs_no_more_than_the_timeout(
    stuck: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "py-spy"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(stacks, "_py_spy", lambda: str(fake))
    started = time.monotonic()
    path = tmp_path / "n1.stacks"
    assert stacks.dump({"rank0": stuck[0]}, path, timeout=1.5)
    assert time.monotonic() - started < 5
    assert "timed out" in path.read_text()
    assert f"Thread {stuck[0]}" in path.read_text()


def test_a_missing_process_or_an_unwritable_file_raises_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    path = tmp_path / "n1.stacks"
    assert stacks.dump({"rank0": gone.pid}, path)
    assert f"Process {gone.pid}: gone" in path.read_text()
    (tmp_path / "file").touch()
    assert not stacks.dump({"rank0": os.getpid()}, tmp_path / "file" / "below")
    assert not stacks.dump({}, tmp_path / "n2.stacks")
