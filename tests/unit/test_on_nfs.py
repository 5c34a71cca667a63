"""Run directories on a shared file system that behaves like NFS: each process here is on a node of its own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import wait_for
from sharedfs import Two
from test_output import Node

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
    """Writes on ``a``."""
    made = Node(two.a, 0)
    yield made
    made.close()
    os.close(made.terminal)


def seen(path: Path) -> list[str]:
    """The output of the workers, as it is seen on that node."""
    return [line.text for line in Logs(path / "logs", Wanted()).written()]


def test_output_is_seen_on_another_node_while_the_round_goes_on(two: Two, node: Node) -> None:
    two.server.behave(write_back_s=600)
    for text in ("one", "two"):
        node.write(0, f"{text}\n".encode())
        wait_for(lambda text=text: text in seen(two.b))


def test_no_output_is_lost_or_doubled_when_the_quota_is_full_for_a_while(
    two: Two, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_RETRY_INTERVAL", 0.05)
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    node.write(0, b"before\n")
    wait_for(lambda: seen(two.b) == ["before"])
    two.server.behave(over_quota=True)
    node.write(0, b"meanwhile\n")
    wait_for(said.getvalue)
    assert "Disk quota exceeded; the workers go on" in said.getvalue()
    two.server.behave(over_quota=False)
    node.write(0, b"after\n")
    wait_for(lambda: seen(two.b)[-1:] == ["after"])
    assert seen(two.b) == ["before", "meanwhile", "after"]


def test_events_are_whole_and_in_order_when_the_quota_was_full(two: Two) -> None:
    ours, theirs = RunDir(two.a), RunDir(two.b)
    ours.append_event(1.0, "first", {})
    two.server.behave(over_quota=True)
    with pytest.raises(OSError, match="quota"):
        ours.append_event(2.0, "second", {})
    with pytest.raises(OSError, match="quota"):
        ours.write("state.json", {"round": 1})
    assert theirs.read("state.json") is None
    two.server.behave(over_quota=False)
    ours.append_event(2.0, "second", {})
    ours.write("state.json", {"round": 1})
    assert [event["event"] for event in theirs.events()] == ["first", "second"]
    assert theirs.read("state.json") == {"round": 1}


def test_the_last_round_is_that_of_the_leader_who_took_over_though_the_one_before_writes_later(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    for when, round in ((1.0, 1), (3.0, 3), (2.0, 2)):
        rundir.append_event(when, "round", {"round": round})
    assert rundir.last_round()["round"] == 3
