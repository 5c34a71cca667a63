"""Run directories on a shared file system that behaves like NFS: each process here acts on a node of its own."""

from __future__ import annotations

import io
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import wait_for
from sharedfs import Two
from test_output import Node

from elastic_hpc.membership.roster import Host
from elastic_hpc.record import worker_logs
from elastic_hpc.record.events import EventReader, append_event
from elastic_hpc.record.folders import is_there
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import Logs, Wanted
from elastic_hpc.workers import output

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    yield made
    made.server.close()


@pytest.fixture
def node(two: Two) -> Iterator[Node]:
    """A node that writes on ``a``."""
    made = Node(two.a, 0)
    yield made
    made.close()
    os.close(made.terminal)


def seen(path: Path) -> list[str]:
    """The output of the workers, as read on that node."""
    return [line.text for line in Logs(path / "logs", Wanted()).written()]


def test_output_is_visible_on_another_node_while_the_round_runs(two: Two, node: Node) -> None:
    two.server.behave(write_back_s=600)
    for text in ("one", "two"):
        node.write(0, f"{text}\n".encode())
        wait_for(lambda text=text: text in seen(two.b))


def test_no_output_is_lost_or_doubled_when_the_quota_is_temporarily_full(
    two: Two, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_RETRY_INTERVAL", 0.05)
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    node.write(0, b"before\n")
    wait_for(lambda: seen(two.b) == ["before"])
    two.server.behave(over_quota=True)
    node.write(0, b"meanwhile\n")
    wait_for(said.getvalue)
    assert "Disk quota exceeded; workers continue" in said.getvalue()
    two.server.behave(over_quota=False)
    node.write(0, b"after\n")
    wait_for(lambda: seen(two.b)[-1:] == ["after"])
    assert seen(two.b) == ["before", "meanwhile", "after"]


def test_output_continues_if_the_agents_own_output_is_on_the_same_full_disk(
    two: Two, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_RETRY_INTERVAL", 0.05)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        two.server.behave(over_quota=True)
        node.write(0, b"meanwhile\n")
        wait_for(lambda: node.destinations[0]._complained)  # type: ignore[union-attr]
        two.server.behave(over_quota=False)
        node.write(0, b"after\n")
        wait_for(lambda: seen(two.b) == ["meanwhile", "after"])


def test_events_are_complete_and_in_order_after_the_quota_was_full(two: Two) -> None:
    ours, theirs = RunDir(two.a), RunDir(two.b)
    append_event(ours.path, "n1", 1.0, "first", {})
    two.server.behave(over_quota=True)
    with pytest.raises(OSError, match="quota"):
        append_event(ours.path, "n1", 2.0, "second", {})
    with pytest.raises(OSError, match="quota"):
        ours.write("state.json", {"round": 1})
    assert theirs.read("state.json") is None
    two.server.behave(over_quota=False)
    append_event(ours.path, "n1", 2.0, "second", {})
    ours.write("state.json", {"round": 1})
    assert [event["event"] for event in theirs.events()] == ["first", "second"]
    assert theirs.read("state.json") == {"round": 1}


def test_a_leader_with_a_full_quota_is_visible_as_active(two: Two) -> None:
    leader, theirs = Recorder(RunDir(two.a), 0, Host(0, "n0", ("127.0.0.1",), 1)), RunDir(two.b)
    leader.event("started", {})
    leader.beat()
    wait_for(theirs.events)
    wait_for(theirs.heartbeat)
    two.server.behave(over_quota=True)
    leader.event("lost", {"node": "n1", "reason": "its connection was closed"})
    last = theirs.heartbeat()

    def is_seen() -> bool:
        leader.beat()
        return theirs.heartbeat() != last

    wait_for(is_seen)
    two.server.behave(over_quota=False)
    leader.close()


def test_a_file_that_another_node_has_just_created_is_found_even_if_it_was_missing_a_moment_ago(two: Two) -> None:
    two.server.behave(names_s=600)
    path = two.b / "run" / "results" / "0.pkl"
    theirs, reader, logs = RunDir(two.b / "run"), EventReader(two.b / "run"), Logs(two.b / "run" / "logs", Wanted())
    assert not is_there(path)
    assert (reader.read(), list(logs.added()), theirs.heartbeat()) == ([], [], 0)
    ours = RunDir(two.a / "run").create()
    (ours.path / "results").mkdir()
    (ours.path / "results" / "0.pkl").touch()
    append_event(ours.path, "n0", 1.0, "start", {})
    log = ours.path / "logs" / "0.1" / worker_logs.file_name("n0", [0])
    log.parent.mkdir(parents=True)
    log.write_bytes(worker_logs.label(0, "out", 1.0) + b"text\n")
    assert is_there(path)
    assert len(reader.read()) == 1
    assert [line.text for line in logs.added()] == ["text"]
    assert theirs.heartbeat() == 0
    ours.beat()
    assert theirs.heartbeat() > 0


def test_the_threads_of_an_agent_keep_running_while_a_process_starts_from_a_stopped_server(two: Two) -> None:
    two.server.behave(attributes_s=600, names_s=600)
    shutil.copy(shutil.which("true") or "", two.a / "program")
    script = (
        "import subprocess, sys, threading\n"
        "from elastic_hpc.agent.threads import run_while_processes_start\n"
        "def print_lines():\n"
        "    for line in sys.stdin:\n"
        "        print(line, end='', flush=True)\n"
        "run_while_processes_start()\n"
        "threading.Thread(target=print_lines).start()\n"
        "subprocess.run([sys.argv[1]], check=True)\n"
    )
    two.server.behave(stopped=True)
    agent = subprocess.Popen(
        [sys.executable, "-c", script, str(two.a / "program")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    try:
        wait_for(children.read_text)
        assert agent.stdin is not None
        assert agent.stdout is not None
        agent.stdin.write("on\n")
        agent.stdin.flush()
        assert select.select([agent.stdout], [], [], 10)[0]
        assert children.read_text()
    finally:
        two.server.behave(stopped=False)
        agent.communicate(timeout=20)
    assert agent.returncode == 0


def test_an_agent_reenters_a_working_directory_that_the_server_has_forgotten_and_never_waits_for_a_server(
    two: Two,
) -> None:
    work = two.a / "work"
    work.mkdir()
    script = (
        "import os, sys, time\n"
        "from elastic_hpc.workers import folder\n"
        "folder.remember()\n"
        "for _ in sys.stdin:\n"
        "    folder.renew()\n"
        "    print('renewed', flush=True)\n"
        "print(os.listdir())\n"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=work
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    print("begin", file=agent.stdin, flush=True)
    assert agent.stdout.readline() == "renewed\n"
    two.server.behave(stopped=True, epoch=1, attributes_s=0)
    print("the server does not answer", file=agent.stdin, flush=True)
    try:
        assert select.select([agent.stdout], [], [], 20)[0]
        assert agent.stdout.readline() == "renewed\n"
    finally:
        two.server.behave(stopped=False)
    (two.there / "work" / "file").touch()
    out, _ = agent.communicate("the server answers\n", timeout=20)
    assert out == "renewed\n['file']\n"


def test_two_leaders_that_write_at_the_same_time_lose_no_event(two: Two) -> None:
    """The first leader is cut off, and does not know yet that the second has taken over."""
    two.server.behave(metadata_s=0.02)
    folders = (two.a, two.b)
    leaders = [Recorder(RunDir(path), 0, Host(n, f"n{n}", ("127.0.0.1",), 1)) for n, path in enumerate(folders)]
    for number in range(20):
        for node, leader in enumerate(leaders):
            leader.event("progress", {"node": f"n{node}", "step": number})
    for leader in leaders:
        leader.close(30)
    for path in folders:
        events = RunDir(path).events()
        assert [(event["step"], event["node"]) for event in events] == [(n, f"n{k}") for n in range(20) for k in (0, 1)]


def test_the_last_round_is_that_of_the_new_leader_even_if_the_previous_leader_writes_later(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    for when, round in ((1.0, 1), (3.0, 3), (2.0, 2)):
        append_event(rundir.path, "n1", when, "round", {"round": round})
    assert rundir.last_round()["round"] == 3
