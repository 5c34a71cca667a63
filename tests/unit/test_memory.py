"""Detecting lack of memory, with real kills by the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
from memory import memory_cgroup

from elastic_hpc.workers.memory import OomWatch


@pytest.mark.parametrize(
    ("act", "kind"), [("x = b'x' * (1 << 30)", "out of memory"), ("os.kill(os.getpid(), 9)", "signal")]
)
def test_a_worker_killed_by_the_kernel_for_its_memory_is_distinguished_from_one_killed_by_hand(
    act: str, kind: str
) -> None:
    agent = """
import subprocess, sys
open(sys.argv[1], 'w').write('0')
from elastic_hpc.membership.causes import explain
from elastic_hpc.workers.memory import OomWatch
watch = OomWatch()
worker = subprocess.run([sys.executable, '-c', 'import os; ' + sys.argv[2]])
cause = explain(worker.returncode, '', oom=watch.happened())
print(worker.returncode, cause.kind, cause.message, sep='|')
"""
    with memory_cgroup() as cgroup:
        cgroup.limit(64 << 20)
        command = [sys.executable, "-c", agent, str(cgroup.procs), act]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    code, found, message = done.stdout.strip().split("|")
    assert (code, found) == ("-9", kind), done.stderr
    assert message.startswith("killed by SIGKILL")
    assert ("--mem" in message) == (kind == "out of memory")


def test_the_kernel_has_killed_nothing_for_this_process() -> None:
    assert not OomWatch().happened()
