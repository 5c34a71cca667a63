"""The activity of silent workers, as the kernel sees it, with real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sharedfs import Server

from elastic_hpc.workers import proc
from elastic_hpc.workers.work import Doing, Work

SLEEPS = "import time; print(flush=True); time.sleep(600)"
COMPUTES = "print(flush=True)\nwhile True: pass"
READS = """
import time
print(flush=True)
while True:
    with open("/proc/self/exe", "rb") as file:
        file.read(2**20)
    time.sleep(0.05)
"""
# The child prints, because during its start vfork makes the parent wait as a device would.
OF_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", request.param], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        pytest.param(SLEEPS, "idle", id="sleeps"),
        pytest.param(COMPUTES, "busy", id="computes"),
        pytest.param(READS, "busy", id="reads"),
        pytest.param(OF_A_CHILD.format(script=COMPUTES), "busy", id="its child computes"),
    ],
    indirect=["started"],
)
def test_the_activity_of_a_worker_is_recognized(started: subprocess.Popen[bytes], expected: Doing) -> None:
    work = Work([os.getppid(), started.pid]) if expected == "busy" else Work([started.pid])
    assert work.look(5.0) == "idle", "nothing is known of work before the first look"
    deadline, seen = time.monotonic() + (20 if expected == "busy" else 1), "idle"
    while seen == "idle" and time.monotonic() < deadline:
        began = time.monotonic()
        time.sleep(0.2)
        seen = work.look(time.monotonic() - began) if expected == "idle" else work.look(0.2)
    assert seen == expected


HUNGRY = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if os.fork() and os.fork():
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print(flush=True)
while True: pass
"""


@pytest.mark.parametrize("started", [HUNGRY], indirect=True)
def test_a_computing_worker_is_busy_even_if_others_leave_it_little_cpu_time(
    started: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc, "trees_of", lambda pids: [{pid} for pid in pids])  # its child may be any other process
    work = Work([started.pid])
    work.look(5.0)
    before, began = proc.cpu_ticks(started.pid), time.monotonic()
    time.sleep(2)
    share = (proc.cpu_ticks(started.pid) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)
    assert share < 0.1
    assert work.look(time.monotonic() - began) == "busy"


@pytest.mark.parametrize("started", [SLEEPS], indirect=True)
def test_a_worker_that_waits_for_a_device_is_blocked(
    started: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work([started.pid])
    work.look(5.0)
    monkeypatch.setattr(proc, "waits_for_device", lambda pid: pid == started.pid)
    assert work.look(5.0) == "blocked"


@pytest.mark.parametrize("started", [READS], indirect=True)
def test_a_worker_that_reads_between_two_waits_for_its_disk_is_busy_in_between(
    started: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, waits = Work([started.pid]), iter([True, False, True, False])
    monkeypatch.setattr(proc, "waits_for_device", lambda _pid: next(waits))
    monkeypatch.setattr(proc, "wants_cpu", lambda _pid: False)
    done = []
    for _ in range(4):
        done.append(work.look(1.0))
        time.sleep(1)
    assert done == ["blocked", "busy"] * 2


def test_the_state_of_a_thread_is_read_from_the_kernel(tmp_path: Path) -> None:
    """The child of a ``vfork`` makes its parent wait as a device would."""
    script = (
        "import ctypes, os, time; libc = ctypes.CDLL(None)\n"
        "print(os.getpid(), flush=True)\n"
        "pid = libc.vfork()\n"
        "if pid == 0:\n    time.sleep(30)\n    os._exit(0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 10
            while not (blocked := proc.waits_for_device(process.pid)) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert blocked
        finally:
            os.killpg(process.pid, 9)
    assert not proc.waits_for_device(process.pid), "it is gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")
def test_a_worker_that_waits_for_a_file_system_in_user_space_is_blocked_even_if_a_signal_would_wake_it(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path / "server", tmp_path / "mount", tmp_path / "control.json")
    for folder in (server.folder, server.path):
        folder.mkdir()
    server.behave(like_fuse=True)
    server.mount()
    (server.path / "file").write_text("text")
    server.behave(stopped=True)
    code = "import sys; print(flush=True); print(open(sys.argv[1]).read())"
    with subprocess.Popen([sys.executable, "-c", code, server.path / "file"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            deadline = time.monotonic() + 10
            while Work([process.pid]).look(5.0) != "blocked" and time.monotonic() < deadline:
                time.sleep(0.05)
            assert proc._stat(process.pid)[0] == b"S", "as with FUSE, not as with NFS"
            assert Work([process.pid]).look(5.0) == "blocked"
            server.behave(stopped=False)
            assert process.wait(20) == 0
        finally:
            server.close()
            process.kill()


def test_a_process_that_is_gone_does_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert (proc.cpu_ticks(process.pid), proc.waits_for_device(process.pid)) == (0, False)
    assert proc.trees_of([process.pid]) == [{process.pid}]
    assert Work([process.pid]).look(5.0) == "idle"
