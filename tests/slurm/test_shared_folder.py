"""Jobs whose script, working directory and run directory are on a shared file system that behaves like NFS at its
worst. Two rows run each time, all with ELASTIC_HPC_ALL_FAULTS=1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cluster, Job, wait_for
from sharedfs import Server

NODES = ("n1", "n2", "n3", "n4")
SCRIPT = "on_nfs.py"
OLD = {"attributes_s": 60.0, "names_s": 60.0}
"""The longest time for which a client caches: acregmax and acdirmax of nfs(5)."""


class Shared:
    """The file system. Each machine of the cluster is a separate client."""

    def __init__(self, cluster: Cluster, data: Path) -> None:
        """``data``: a folder on another file system, which always works."""
        self.cluster, self.data = cluster, data
        path, folder = cluster.home / "nfs", cluster.home / "nfs.server"
        self.work, self.there = path / "work", folder / "work"
        cluster.exec(["mkdir", "-p", str(path), str(self.there)])
        self.server = Server(folder, path, cluster.state / "nfs.json")
        self.server.behave(metadata_s=0.02, write_back_s=2)  # soon enough for a test that looks at the server
        for machine in ("login", *NODES):
            self.mount(machine)
        self.off = set[str]()
        """Nodes without power."""
        cluster.exec(["cp", str(Path(__file__).with_name(SCRIPT)), str(self.work)])

    def mount(self, machine: str) -> None:
        init = (self.cluster.state / "machines" / machine).read_text().split()[0]
        self.server.mount(inside=["nsenter", f"--target={init}", "-m", "-u", "-n", "-p", "--wd=/", "--"])

    def submit(self, *options: str, checkpoints: Path | None = None) -> Job:
        """Submit ``SCRIPT``, which runs until ``finish``."""
        self.cluster.exec(["touch", "hold"], cwd=self.data)
        elastic_sbatch = str(Path(sys.executable).with_name("elastic-sbatch"))
        script = [SCRIPT, str(self.data), *([str(checkpoints)] if checkpoints else [])]
        id = self.cluster.exec([elastic_sbatch, "--parsable", *options, *script], cwd=self.work).stdout.strip()
        return Job(self.cluster, id, self.there, data=self.data)

    def look(self, name: str) -> None:
        """Look for ``name`` on all nodes, which then cache for a while that the working directory has no such file."""
        for node in NODES:
            assert self.cluster.exec(["test", "-e", name], node, check=False, cwd=self.work).returncode == 1

    @contextlib.contextmanager
    def stopped(self, seconds: float) -> Iterator[None]:
        """Stop the server for at least ``seconds``."""
        self.server.behave(stopped=True)
        began = time.monotonic()
        yield
        wait_for("the time to pass", lambda: time.monotonic() > began + seconds, seconds + 30)
        self.server.behave(stopped=False)

    def kill(self, *nodes: str) -> None:
        for node in nodes:
            self.cluster.mini("kill", node)
            self.off.add(node)

    def requeued(self, job: Job, *lost: str) -> None:
        """Wait until the job is requeued, and heal the nodes that it has lost."""
        if self.off == {*NODES} and self.cluster.is_site:  # no agent is left to notify Slurm
            self.cluster.wait_noticed(*self.off)
        wait_for("the requeue", lambda: self.cluster.job_field(job.id, "Restarts") == "1", 120)
        self.cluster.exec(["scontrol", "hold", job.id])  # until the nodes have their mounts
        for node in lost:
            self.cluster.mini("heal", node)
            self.mount(node)
            self.off.remove(node)
        self.cluster.exec(["scontrol", "release", job.id])

    def finish(self, job: Job) -> None:
        self.cluster.exec(["rm", "hold"], cwd=self.data)
        if "n1" in self.off and self.cluster.is_site:  # the job completes without its batch host
            self.cluster.wait_noticed(*self.off)
            job.wait_state("PENDING")  # Slurm restarts it once more, two minutes later
            self.cluster.mini("exec", "--root", "--", "scontrol", "update", f"JobId={job.id}", "StartTime=now")
        state = job.wait_state("COMPLETED", "FAILED", "CANCELLED")
        assert state == "COMPLETED", (self.cluster.job_field(job.id, "ExitCode"), job.output()[-3000:])
        wait_for("the verdict", lambda: job.verdict()["outcome"] == "finished", 10)


@pytest.fixture
def shared(fresh: Cluster, folder: Path) -> Iterator[Shared]:
    made = Shared(fresh, folder)
    yield made
    made.server.behave(stopped=False, over_quota=False)
    for record in made.there.rglob("events.*.jsonl"):  # pytest shows this output if the test has failed
        print(record, record.read_text(), sep="\n")
    for output in made.there.glob("slurm-*.out"):
        print(output, output.read_text(errors="replace"), sep="\n")
    try:
        fresh.reset()
    finally:
        made.server.close()
    shutil.rmtree(made.server.folder)


def start(shared: Shared) -> Job:
    """The caches of all nodes have no run directory, and no folder for run directories."""
    shared.server.behave(**OLD)
    before = shared.cluster.exec(["sbatch", "--parsable", "-o/dev/null", "--wrap=true"]).stdout.strip()
    wait_for("an empty queue", lambda: not shared.cluster.exec(["squeue", "--noheader"]).stdout)
    shared.look("elastic-logs")
    shared.cluster.exec(["mkdir", "elastic-logs"], cwd=shared.work)
    shared.look(f"elastic-logs/{int(before) + 1}/secret")
    return shared.submit("--nodes", "2:4")


def head_lost(shared: Shared) -> Job:
    """A node is lost, then the head."""
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(20)
    shared.kill("n4")
    job.wait_event("round", 2)
    job.wait_steps(20, round=2)
    shared.kill("n1")
    job.wait_event("take_over")
    job.wait_steps(20, round=3)
    return job


def server_stops(shared: Shared) -> Job:
    """The server stops for a minute, in which a node is lost."""
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(20)
    with shared.stopped(60):
        shared.kill("n4")
    job.wait_event("round", 2)
    job.wait_steps(20, round=2)
    assert [event["node"] for event in job.events("lost")] == ["n4"]
    return job


def server_stops_for_longer_than_a_hang(shared: Shared) -> Job:
    """The job has learned a hang timeout of five minutes."""
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(20)
    began = job.steps()[0]["time"]
    wait_for("more steps than the first ones", lambda: job.steps()[-1]["time"] > began + 30)
    with shared.stopped(340):
        pass
    after = len(job.steps())
    job.wait_steps(after + 50)
    assert job.events("hang_timeout")[-1]["seconds"] < 340
    assert job.events("failure") == job.events("lost") == []
    return job


def server_stops_at_take_over(shared: Shared) -> Job:
    """Another node takes over and forms the next round before the server answers again."""
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(20)
    with shared.stopped(30):
        shared.kill("n1")
    answers = time.time()
    formed = job.wait_event("round", 2)
    assert formed["leader"] == "n2"
    assert formed["time"] < answers
    job.wait_steps(20, round=2)
    return job


def requeue(shared: Shared) -> Job:
    """The job falls below MIN."""
    shared.server.behave(**OLD)
    job = shared.submit("--nodes", "3:4")
    job.wait_steps(25)
    shared.kill("n3", "n4")
    assert job.wait_event("verdict")["outcome"] == "requeue"
    shared.requeued(job, "n3", "n4")
    job.wait_steps(20, round=2)
    return job


def requeue_of_all(shared: Shared) -> Job:
    """All nodes are lost, so no agent can request a requeue."""
    shared.server.behave(**OLD)
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(25)
    shared.kill(*NODES)
    shared.requeued(job, *NODES)
    job.wait_steps(20, round=2, deadline=240)
    return job


def growth(shared: Shared) -> Job:
    """The caches of the joining nodes have no record of the job."""
    shared.server.behave(**OLD)
    other = shared.cluster.exec(
        ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--nodelist=n[3-4]", "-o/dev/null", "--wrap=sleep 600"]
    ).stdout.strip()
    wait_for("the other job", lambda: shared.cluster.job_field(other, "JobState") == "RUNNING")
    shared.look(f"elastic-logs/{int(other) + 1}/secret")
    job = shared.submit("--nodes", "2:4", "--grow", "--grow-every", "1", "--exclusive")
    job.wait_steps(20)
    shared.cluster.exec(["scancel", other])
    wait_for("a world of four", lambda: job.worlds()[-1:] == [4], 120)
    return job


def full_quota(shared: Shared) -> Job:
    """A node is lost while nothing can be written to the run directory."""
    job = shared.submit("--nodes", "2:4", checkpoints=shared.data / "checkpoints")
    job.wait_steps(20)
    shared.server.behave(over_quota=True)
    shared.kill("n4")
    job.wait_steps(20, round=2)
    shared.server.behave(over_quota=False)
    job.wait_event("round", 2)
    return job


def forgotten_files(shared: Shared) -> Job:
    """On the server, each file of the run directory is replaced by a copy, then the server forgets all open files, and
    the working directory.
    """
    job = shared.submit("--nodes", "2:4", checkpoints=shared.data / "checkpoints")
    job.wait_steps(20)
    for path in [path for path in job.run_dir.rglob("*") if path.is_file()]:
        copy, owner = path.with_name(f".{path.name}.copy"), path.stat()
        shutil.copy2(path, copy)
        os.chown(copy, owner.st_uid, owner.st_gid)
        copy.replace(path)
    shared.server.behave(epoch=1)
    shared.kill("n4")
    job.wait_event("round", 2)
    job.wait_steps(20, round=2)
    return job


@dataclass(frozen=True)
class Row:
    play: Callable[[Shared], Job]
    worlds: list[int]
    each_time: bool = False


ROWS = (
    Row(start, [4]),
    Row(head_lost, [4, 3, 2]),
    Row(server_stops, [4, 3]),
    Row(server_stops_for_longer_than_a_hang, [4]),
    Row(server_stops_at_take_over, [4, 3], each_time=True),
    Row(requeue, [4, 4]),
    Row(requeue_of_all, [4, 4]),
    Row(growth, [2, 4]),
    Row(full_quota, [4, 3]),
    Row(forgotten_files, [4, 3]),
)
ALL = "ELASTIC_HPC_ALL_FAULTS" in os.environ


@pytest.mark.parametrize("row", [row for row in ROWS if row.each_time or ALL], ids=lambda row: row.play.__name__)
def test_no_step_is_lost_when_the_file_system_is_at_its_worst(shared: Shared, row: Row) -> None:
    job = row.play(shared)
    shared.finish(job)
    job.assert_steps_contiguous(10)
    assert job.worlds() == row.worlds
