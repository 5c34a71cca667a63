"""A node whose worker gets half of its CPU, on a real Slurm: the job names it within 200 steps, and leaves it if the
user wants that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Cluster, wait_for
from on_demand import ON_DEMAND
from test_grow import Steady, Submit
from test_resize import ask

CPU = Path("/sys/fs/cgroup/cpu")
PERIOD = 0.1
"""Seconds: the default of the kernel, and of most sites."""


@pytest.fixture
def training(submit: Submit, folder: Path) -> Callable[..., Steady]:
    def do(*options: str) -> Steady:
        script = Path(shutil.copy(Path(__file__).with_name("cpu_steps.py"), folder))
        return Steady(submit("--exclusive", *options, script=script), folder)

    return do


@pytest.fixture
def half_of_its_cpu() -> Iterator[Callable[[int], None]]:
    """Gives a process half of the CPU that it has recently used, as cpu.max or a container's limit does."""
    group = CPU / f"elastic-hpc-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(int(1e6 * PERIOD)))
    except OSError as error:
        pytest.skip(f"needs cgroup v1's cpu, as root: {error}")

    def used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def limit(pid: int) -> None:
        before, began = used(pid), time.monotonic()
        time.sleep(5)
        share = (used(pid) - before) / (time.monotonic() - began)
        (group / "cpu.cfs_quota_us").write_text(str(max(1000, int(1e6 * PERIOD * share / 2))))
        (group / "cgroup.procs").write_text(str(pid))

    yield limit
    for pid in (group / "cgroup.procs").read_text().split():  # the test has failed
        with contextlib.suppress(OSError):
            (CPU / "cgroup.procs").write_text(pid)
    wait_for("the cgroup to be empty", lambda: not (group / "cgroup.procs").read_text(), 60)
    group.rmdir()


def last_step(job: Steady) -> int:
    return int(job.job.lines(job.data / "steps.jsonl")[-1]["step"])


def wait_named(job: Steady, since: int) -> None:
    slow = job.job.wait_event("slow", deadline=300)
    steps = [each["step"] for each in job.job.lines(job.data / "steps.jsonl") if each["time"] <= slow["time"]]
    print(f"named after {steps[-1] - since} steps: {slow}")
    assert slow["node"] == "n3"
    assert slow["times"] >= 1.5
    assert steps[-1] - since <= 200


@ON_DEMAND
def test_a_node_with_half_of_its_cpu_is_left_at_a_step_boundary_and_gets_a_strike(
    training: Callable[..., Steady], half_of_its_cpu: Callable[[int], None], fresh: Cluster
) -> None:
    job = training("--nodes", "2:4", "--slow-node", "1.5:leave")
    job.wait_world(4, 240)  # its workers compute, next to other load of this machine
    wait_for("the nodes to be compared for a while", lambda: last_step(job) > 400, 600)
    assert job.job.events("slow") == []
    (worker,) = fresh.running("cpu_steps.py", "n3")
    half_of_its_cpu(worker)
    wait_named(job, last_step(job))
    job.wait_world(3)
    assert job.job.events("round")[-1]["nodes"] == ["n1", "n2", "n4"]
    assert job.repeated_steps() == 0
    for command in ("status", "why"):
        assert "slow node: " in ask(job, command).stdout
    job.finish()
    (leave,) = job.job.events("leave")
    assert (leave["node"], leave["exclude"]) == ("n3", True)
    assert (job.job.verdict()["restarts"], job.job.events("lost")) == (0, [])
