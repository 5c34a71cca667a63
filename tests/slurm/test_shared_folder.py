"""Jobs whose run directory, working directory and logs are on a shared file system that behaves like NFS."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import COUNTS, Cluster, Job, wait_for
from sharedfs import Server

EVERY = 10
MACHINES = ("login", "n1", "n2", "n3", "n4")


class Shared:
    """The file system; each machine of the cluster is a client of its own."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        path, folder = cluster.home / "nfs", cluster.home / "nfs.server"
        cluster.exec(["mkdir", "-p", str(path), str(folder)])
        self.server = Server(folder, path, cluster.state / "nfs.json")
        self.server.behave(metadata_s=0.02, write_back_s=2)  # soon enough for a test that looks at the server
        for machine in MACHINES:
            self.mount(machine)

    def mount(self, machine: str) -> None:
        init = (self.cluster.state / "machines" / machine).read_text().split()[0]
        self.server.mount(inside=["nsenter", f"--target={init}", "-m", "-u", "-n", "-p", "--wd=/", "--"])

    def submit(self, *options: str) -> Job:
        """Of counts.py, which goes on until ``finish``."""
        self.cluster.exec(["touch", "hold"], cwd=self.server.path)
        command = [str(Path(sys.executable).with_name("elastic-sbatch")), "--parsable", *options, COUNTS]
        id = self.cluster.exec(command, cwd=self.server.path).stdout.strip()
        return Job(self.cluster, id, self.server.folder)

    def finish(self, job: Job) -> None:
        self.cluster.exec(["rm", "hold"], cwd=self.server.path)
        state = job.wait_state("COMPLETED", "FAILED", "CANCELLED")
        assert state == "COMPLETED", job.output()[-3000:]
        wait_for("the verdict", lambda: job.verdict()["outcome"] == "finished", 10)


@pytest.fixture
def shared(fresh: Cluster) -> Iterator[Shared]:
    made = Shared(fresh)
    yield made
    for record in made.server.folder.rglob("events.jsonl"):  # pytest shows what is printed here if the test has failed
        print(record, record.read_text(), sep="\n")
    for output in made.server.folder.glob("slurm-*.out"):
        print(output, output.read_text(errors="replace"), sep="\n")
    try:
        fresh.reset()
    finally:
        made.server.close()
    shutil.rmtree(made.server.folder)


@pytest.mark.skipif("ELASTIC_HPC_ALL_FAULTS" not in os.environ, reason="takes two minutes: ELASTIC_HPC_ALL_FAULTS=1")
def test_training_outlives_a_lost_node_and_the_lost_head(shared: Shared, fresh: Cluster) -> None:
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(20)
    fresh.mini("kill", "n4")
    job.wait_event("round", 2)
    job.wait_steps(20, round=2)
    fresh.mini("kill", "n1")
    job.wait_event("take_over")
    job.wait_steps(20, round=3)
    shared.finish(job)
    assert [len(event["nodes"]) for event in job.events("round")[:3]] == [4, 3, 2]


def test_a_server_that_stops_for_a_minute_while_a_node_is_lost_costs_no_more_than_that_minute(
    shared: Shared, fresh: Cluster
) -> None:
    job = shared.submit("--nodes", "2:4")
    job.wait_steps(20)
    shared.server.behave(stopped=True)
    began = time.monotonic()
    fresh.mini("kill", "n4")
    wait_for("the minute to pass", lambda: time.monotonic() > began + 60)
    shared.server.behave(stopped=False)
    job.wait_event("round", 2)
    job.wait_steps(20, round=2)
    shared.finish(job)
    assert [event["node"] for event in job.events("lost")] == ["n4"]
    assert [len(event["nodes"]) for event in job.events("round")] == [4, 3]
