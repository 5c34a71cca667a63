"""The promises of a node outlive its agent: their file, and how agents use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_hpc.agent import promise_file
from elastic_hpc.agent.promise_file import PromiseFile, PromisesKey, begin, clean_up
from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.election import Base
from elastic_hpc.membership.messages import ProtocolError, decode_from_leader
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster


def roster(round: int, hosts: int = 2) -> Roster:
    known = tuple(Host(node, f"n{node}", (f"10.0.0.{node}",), 29432) for node in range(hosts))
    members = tuple(range(hosts))
    return Roster(round, known, (Base(round, 0, members),), 1, 0, members, f"{round}.0.1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PromisesKey:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(promise_file, "memory_folder", lambda: str(tmp_path / "shm"))
    return PromisesKey(tmp_path / "run", "17", 0, 3)


def files(place: PromisesKey) -> list[str]:
    return sorted(os.listdir(place.run_dir.parent / "shm"))


@pytest.fixture
def opened() -> Iterator[list[PromiseFile]]:
    files: list[PromiseFile] = []
    yield files
    for file in files:
        file.close()


def start(place: PromisesKey, opened: list[PromiseFile], *, again: bool) -> Promises:
    """Start an agent; the previous agent is dead."""
    while opened:
        opened.pop().close()
    promises, file = begin(place, 4, again=again)
    if file:
        opened.append(file)
    return promises


def test_the_next_agent_of_the_node_finds_the_last_promises(place: PromisesKey, opened: list[PromiseFile]) -> None:
    promises = start(place, opened, again=False)
    assert (promises.votes, promises.seen, promises.roster) == (True, 0, None)
    for round in range(1, 6):
        promises.promise(round)
        assert promises.accept(roster(round))
    promises.promise(7)
    assert not promises.accept(roster(4))
    again = start(place, opened, again=True)
    assert (again.votes, again.seen) == (True, 7)
    assert again.roster == roster(5)
    again.forget_bases_before(9)
    assert start(place, opened, again=True).roster == Roster(5, roster(5).hosts, (), 1, 0, (0, 1), "5.0.1")


def test_changes_are_stored_one_by_one_until_they_are_longer_than_the_roster() -> None:
    kept: list[bytes] = []
    promises, held = Promises(kept.append), roster(1, 9)
    assert promises.accept(decode_from_leader(held.line))
    for round in range(2, 9):
        later = roster(round, 9 + round % 2)
        change = later.change_from(held)
        assert change
        assert not promises.accept(replace(change, previous="another"))
        assert promises.accept(decode_from_leader(change.line))
        again = Promises(kept=kept[-1])
        assert again.roster == promises.roster == later
        assert len(kept[-1]) < 2 * len(held.line) + 100
        held = later
    lines = [one.count(b"\n") for one in kept]
    assert lines[:3] == [1, 2, 3]
    assert 2 in lines[3:], "a whole roster again"
    with pytest.raises(ProtocolError, match="not what a node has promised"):
        Promises(kept=kept[1].splitlines(keepends=True)[0] + change.line)


def test_an_agent_without_a_file_has_no_vote_except_the_first_agent_of_a_run(
    place: PromisesKey, opened: list[PromiseFile]
) -> None:
    assert not start(place, opened, again=True).votes
    assert files(place) == []
    start(place, opened, again=False).promise(5)
    (left,) = files(place)
    assert start(place, opened, again=False).seen == 0
    assert files(place) != [left]
    assert not start(PromisesKey(place.run_dir, "17", 1, 3), opened, again=True).votes
    assert files(place) == [], "what an earlier run has left is removed"


def test_an_interrupted_write_leaves_the_previous_promises(place: PromisesKey, opened: list[PromiseFile]) -> None:
    start(place, opened, again=False).promise(5)
    start(place, opened, again=True).promise(6)
    (name,) = files(place)
    path = place.run_dir.parent / "shm" / name
    raw = path.read_bytes()
    at = raw.index(b'"seen":6')
    path.write_bytes(raw[: at + 4] + b"\0" * 8 + raw[at + 12 :])
    found = start(place, opened, again=True)
    assert (found.votes, found.seen) == (True, 5)


@pytest.mark.parametrize("what", ["damaged", "empty", "of an older boot"])
def test_an_unreliable_file_counts_as_missing(place: PromisesKey, opened: list[PromiseFile], what: str) -> None:
    start(place, opened, again=False).promise(5)
    (name,) = files(place)
    path = place.run_dir.parent / "shm" / name
    raw = path.read_bytes()
    path.write_bytes({"damaged": raw.replace(b"seen", b"5een"), "empty": b""}.get(what, b"x" * 64 + raw[64:]))
    assert not start(place, opened, again=True).votes
    assert files(place) == []


def test_two_agents_of_one_node_never_share_a_file_and_only_files_of_dead_agents_are_removed(
    place: PromisesKey, opened: list[PromiseFile]
) -> None:
    start(place, opened, again=False)
    for again in (True, False):
        with pytest.raises(ElasticError, match="another agent of this node runs already"):
            begin(place, 4, again=again)
    for run in (0, 1):
        clean_up(PromisesKey(place.run_dir, "17", run, 0), ended=True)
    clean_up(PromisesKey(place.run_dir, "18", 0, 0), ended=False)
    assert len(files(place)) == 1
    opened.pop().close()
    clean_up(PromisesKey(place.run_dir, "17", 0, 0), ended=False)
    assert len(files(place)) == 1, "the run goes on"
    clean_up(PromisesKey(place.run_dir, "17", 0, 0), ended=True)
    assert files(place) == []


def test_a_file_of_another_user_is_not_read(
    place: PromisesKey, opened: list[PromiseFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(place, opened, again=False).promise(5)
    (name,) = files(place)
    assert (place.run_dir.parent / "shm" / name).stat().st_mode & 0o777 == 0o600
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert not start(place, opened, again=True).votes
    assert files(place) == [name]


def test_a_roster_of_a_thousand_hosts_fits_and_a_promise_that_does_not_fit_is_an_error(place: PromisesKey) -> None:
    promises, file = begin(place, 1024, again=False)
    assert file
    promises.accept(roster(1, 1024))
    with pytest.raises(OSError, match="do not fit"):
        promises.accept(roster(2, 20_000))
    file.close()
    found, file = begin(place, 1024, again=True)
    assert file
    assert found.roster == roster(1, 1024)
    file.remove()


def test_an_agent_that_is_killed_while_it_writes_leaves_a_whole_promise(tmp_path: Path, place: PromisesKey) -> None:
    write = """
import sys
from pathlib import Path
from elastic_hpc.agent import promise_file
promise_file.memory_folder = lambda: sys.argv[1]
promises, _ = promise_file.begin(promise_file.PromisesKey(Path(sys.argv[2]), "17", 0, 3), 4, again=False)
for round in range(1, 1 << 40):
    promises.promise(round)
    if round % 1000 == 0:
        print(round, flush=True)
"""
    agent = [sys.executable, "-c", write, str(tmp_path / "shm"), str(place.run_dir)]
    for _ in range(3):
        with subprocess.Popen(agent, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            process.stdout.readline()
            process.kill()
            said = [1000, *map(int, process.stdout.read().split())]
        promises, file = begin(place, 4, again=True)
        assert file
        assert promises.votes
        assert promises.seen >= said[-1]
        file.remove()
