"""A run directory that is full, or read-only, while another agent takes over: on real file systems of their own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cluster import Cluster, Node, end_of, wait_for
from test_script import stub

from elastic_hpc import slurm
from elastic_hpc.agent import conclude, last_words
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.job.script import render
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.strikes import NEVER_JOINED, Strike, dump
from elastic_hpc.network.client import ask_leader
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import NodeRange
from elastic_hpc.record.endpoint import Published, read_published
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm import steps

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")


class Disk:
    """A file system of 256 KiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"
        mount("-t", "tmpfs", "-o", "size=256k,mode=755", "none", str(path))

    def fill(self) -> None:
        """Fill the file system completely."""
        with pytest.raises(OSError, match="No space left") as full, self._filler.open("wb", buffering=0) as file:  # noqa: PT012
            while True:
                file.write(b"x" * 4096)
        assert full.value.errno == errno.ENOSPC

    def empty(self) -> None:
        self._filler.unlink()

    def protect(self) -> None:
        mount("-o", "remount,ro", str(self.path))

    def unprotect(self) -> None:
        mount("-o", "remount,rw", str(self.path))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def cluster(disk: Disk) -> Iterator[Cluster]:
    made = Cluster(disk.path)
    yield made
    made.close()


def train(cluster: Cluster) -> int:
    """Let all agents train in the next round. Returns its number."""
    (round,) = {seat.round for seat in cluster.seats()}
    for node in cluster.nodes:
        node.train(round)
    return round


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_all_agents_find_a_leader_that_cannot_publish_its_address(cluster: Cluster, disk: Disk, how: str) -> None:
    train(cluster)
    wait_for(lambda: read_published(cluster.rundir) and read_published(cluster.rundir).others)  # type: ignore[union-attr]
    (disk.fill if how == "full" else disk.protect)()
    cluster.nodes[0].die()
    cluster.wait_stop(1)
    round = train(cluster)
    published = read_published(cluster.rundir)
    assert published
    assert published.leader.node == 0, "that is the dead one"

    with ThreadPoolExecutor(1) as threads:  # a new agent has only the run directory
        cluster.nodes.append(Node(cluster, 3, first=False))
        seat = threads.submit(cluster.nodes[-1].control.next_seat)
        for control in cluster.controls[:-1]:
            wait_for(lambda control=control: control.must_stop(round))
        round = max(seat.round for seat in cluster.seats(cluster.nodes[:-1]))
        assert seat.result(timeout=20).plan.group_world_size == 3
    for node in cluster.nodes:
        node.train(round)
    ask_leader(cluster.rundir, "drain", "time limit")
    for control in cluster.controls:
        wait_for(lambda control=control: control.order and control.order.drain)

    (disk.empty if how == "full" else disk.unprotect)()
    leader = cluster.nodes[0].host
    wait_for(lambda: (found := read_published(cluster.rundir)) and found.leader == leader, seconds=5)
    wait_for(lambda: cluster.events("take_over"), seconds=5)
    wait_for(lambda: (cluster.rundir.read("state.json") or {}).get("round") == round, seconds=5)
    for control in cluster.controls:
        control.report("succeeded", round, drained=True)
    assert {end_of(control, round).outcome for control in cluster.controls} == {"failed"}, "it cannot be requeued"
    wait_for(lambda: cluster.rundir.read("verdict.json"))


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_every_failed_write_is_repeated_until_it_succeeds(disk: Disk, how: str) -> None:
    rundir = RunDir(disk.path / "run").create()
    old, new = Host(0, "n0", ("10.0.0.1",), 1), Host(1, "n1", ("10.0.0.2",), 2)
    first = Recorder(rundir, 0, old)
    first.event("started", {})
    first.beat()
    first.publish([old, new])
    first.close()
    before = (rundir.path / "endpoint.json").stat().st_mtime_ns
    (disk.fill if how == "full" else disk.protect)()
    recorder = Recorder(rundir, 0, new)
    recorder.options({"--nodes": "1:2"})
    recorder.publish([new])
    recorder.event("lost", {"node": "n0", "reason": "x" * 5000})
    recorder.state(round=2)
    with pytest.raises(OSError, match=r"No space left|Read-only"):
        recorder.verdict({"outcome": "finished"}).result(timeout=5)
    beat = rundir.heartbeat()
    recorder.beat()
    if how == "full":
        wait_for(lambda: rundir.heartbeat() != beat)
    assert read_published(rundir) == Published(0, old, (new,))
    assert (rundir.path / "endpoint.json").stat().st_mtime_ns == before, "nothing says that the old leader is at work"
    (disk.empty if how == "full" else disk.unprotect)()

    def stands() -> bool:
        recorder.beat()
        return rundir.read("verdict.json") is not None and len(rundir.events()) == 2

    wait_for(stands, seconds=5)
    assert read_published(rundir) == Published(0, new)
    assert [event["event"] for event in rundir.events()] == ["started", "lost"]
    assert (rundir.read("state.json") or {})["strikes"][0]["node"] == "n0"
    assert rundir.read("spec.json") == {"--nodes": "1:2"}
    assert not [name for name in os.listdir(rundir.path) if name.startswith(".")], "no half-written files"
    recorder.close()


def test_a_node_that_never_joined_is_avoided_until_its_agent_joins(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    recorder = Recorder(rundir, 0, Host(0, "n0", ("10.0.0.1",), 1))
    for node in ("n1", "n2"):
        recorder.event("absent", {"node": node, "reason": NEVER_JOINED})
    recorder.event("lost", {"node": "n2", "reason": "its connection was closed", "round": 1, "silent": 0.0})
    recorder.event("join", {"node": "n2", "addr": "10.0.0.3", "joiner": False})
    recorder.state(round=1)
    recorder.close()
    struck = [(strike["node"], strike["reason"]) for strike in (rundir.read("state.json") or {})["strikes"]]
    assert struck == [("n1", NEVER_JOINED), ("n2", "its connection was closed")]


def test_a_leader_whose_file_system_is_briefly_unavailable_forgets_no_strike(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run").create()
    before = Strike("n3", time.time(), "its power was lost")
    rundir.write("state.json", {"round": 1, "strikes": dump([before])})
    rundir.path.rename(tmp_path / "away")
    recorder = Recorder(rundir, 0, Host(0, "n0", ("10.0.0.1",), 1))
    recorder.state(round=2)
    recorder.flush()
    (tmp_path / "away").rename(rundir.path)
    recorder.close()
    state = rundir.read("state.json") or {}
    assert (state["round"], state["strikes"]) == (2, dump([before]))


@pytest.mark.parametrize(("notices", "seconds"), [(True, 60), (False, 5), (None, 60)])
def test_a_job_does_not_hold_its_nodes_if_slurm_takes_minutes_to_notice_a_loss(
    monkeypatch: pytest.MonkeyPatch, *, notices: bool | None, seconds: int
) -> None:
    def notices_within(_seconds: float) -> bool:
        if notices is None:
            raise SlurmError("no answer")
        return notices

    monkeypatch.setattr(slurm, "notices_within", notices_within)
    assert conclude._time_for_slurm() == timedelta(seconds=seconds)


@pytest.mark.parametrize("shows", ["nodes", "partitions", "nothing"])
def test_a_requeue_reports_what_it_cannot_see_and_avoids_the_nodes_in_its_own_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shows: str
) -> None:
    rundir, nodes = RunDir(tmp_path), frozenset({"n1", "n2", "n3", "n4"})

    def usable(_job: str) -> tuple[frozenset[str], str]:
        if shows == "nothing":
            raise SlurmError("Access/permission denied")
        return nodes, "Access/permission denied" if shows == "partitions" else ""

    monkeypatch.setattr(slurm, "usable_nodes", usable)
    rundir.write("spec.json", {"--nodes": "3:3"})
    rundir.write("state.json", {"strikes": dump([Strike("n3", time.time(), NEVER_JOINED)])})
    assert conclude._nodes_to_avoid(rundir, "7") == (((), ()) if shows == "nothing" else (("n3",), ()))
    assert ("denied" in capsys.readouterr().err) == (shows != "nodes")


def test_a_secret_is_complete_or_missing(disk: Disk) -> None:
    rundir = RunDir(disk.path / "run").create()
    disk.fill()
    with pytest.raises(ElasticError, match="No space left"):
        rundir.make_secret()
    disk.empty()
    assert len(rundir.make_secret()) == 64


def test_without_a_leader_the_error_names_the_nodes_that_were_asked(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path).create()
    rundir.make_secret()
    hosts = [Host(node, f"n{node}", ("127.0.0.1",), 1) for node in range(3)]
    rundir.write("endpoint.json", Published.of(0, hosts[0], hosts).body())
    with pytest.raises(ElasticError, match=r"the leader on n0 port 1 did not answer: .*asked: n1, n2"):
        ask_leader(rundir, "stop")


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("failed", 1)])
def test_the_batch_script_knows_the_end_of_the_job_even_if_no_verdict_could_be_written(
    disk: Disk, capsys: pytest.CaptureFixture[str], outcome: str, code: int
) -> None:
    rundir = RunDir(disk.path / "run").create()
    disk.protect()
    job = f"test{os.getpid()}"
    last_words.leave(job, 0, outcome, "as the leader has said")
    assert conclude.conclude(rundir, {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": "1"}, 0) == 1, "of another run"
    assert conclude.conclude(rundir, {"SLURM_JOB_ID": job}, 137) == code
    assert f"{outcome}: as the leader has said" in capsys.readouterr().err
    assert conclude.conclude(rundir, {"SLURM_JOB_ID": job}, 137) == 137, "it is told once"


def test_a_job_without_a_batch_host_is_cancelled_if_its_script_could_not_know_that_it_has_ended(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Slurm restarted the script, it would train again."""
    rundir = RunDir(disk.path / "run").create()
    disk.protect()
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("scontrol", "squeue", "scancel"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\nexit {int(name != "scancel")}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setattr(conclude, "_ALONE_TIMEOUT", timedelta(0))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}
        assert conclude.conclude_alone(rundir, environ, "finished", deputy_of=None) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "scancel 7"


def test_an_agent_starts_even_if_its_log_cannot_be_written(disk: Disk, tmp_path: Path) -> None:
    disk.protect()
    done = tmp_path / "done"
    command = ["sh", "-c", steps._SHELL, "sh", str(disk.path / "again-n3.log"), "touch", str(done)]
    shell = subprocess.run(command, input=b"go\n", capture_output=True, timeout=20, check=True)
    assert (shell.stdout, shell.stderr, done.exists()) == (b"started\ngoing\n", b"", True)


def test_a_request_reaches_a_run_whose_leader_could_never_publish_its_address(cluster: Cluster) -> None:
    """The run directory has the address of the previous run."""
    cluster.seats()
    for node in cluster.nodes:
        node.train(1)
    wait_for(lambda: (found := read_published(cluster.rundir)) and found.others)
    body = cluster.rundir.read("endpoint.json")
    assert body
    cluster.rundir.write("endpoint.json", {**body, "run": -1})
    ask_leader(cluster.rundir, "drain", "time limit")
    for control in cluster.controls:
        wait_for(lambda control=control: control.order and control.order.drain)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_the_batch_script_restarts_in_a_run_directory_that_cannot_be_written(
    disk: Disk, tmp_path: Path, how: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, does in (("srun", f"echo >> {tmp_path}/ran"), ("scontrol", "echo n1"), ("python", "")):
        stub(tools, name, does)
    spec = JobSpec(
        launch=LaunchSpec("train.py", nodes=NodeRange(2, 4)), log_dir=str(disk.path), python=str(tools / "python")
    )
    script = tmp_path / "script"
    script.write_text(render(spec))
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4"}
    for _ in range(2):
        subprocess.run(["bash", script], env=environ, check=True, timeout=20)
    before = (disk.path / "7" / "script.sbatch").read_bytes()
    assert before == script.read_bytes()
    script.write_text(f"{script.read_text()}# {'x' * 4096}\n")  # edited in the meantime
    (disk.fill if how == "full" else disk.protect)()
    subprocess.run(["bash", script], env=environ, check=True, timeout=20)
    assert (tmp_path / "ran").read_text().count("\n") == 3
    assert (disk.path / "7" / "script.sbatch").read_bytes() == before, "nor was it made empty"
