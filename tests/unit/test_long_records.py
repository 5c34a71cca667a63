"""Records of jobs that ran for weeks: each look reads only new events, keeps little in memory, and gives the same
story.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import records
from rich.console import Console

from elastic_hpc.cli.hpc import main
from elastic_hpc.job.handle import why
from elastic_hpc.job.look import JobRecord, Jobs, Look
from elastic_hpc.record.registry import remember
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import label
from elastic_hpc.view.account import account, phases
from elastic_hpc.view.story import JoinedNode, Round, Story
from elastic_hpc.view.story_builder import story_of
from elastic_hpc.view.timeline import html

ROUNDS, REPORTS = 3, 9000
"""One report every ten seconds, in rounds of about a day."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return records.alone(tmp_path, monkeypatch)


def days(began: float = 1e9) -> Iterator[dict[str, Any]]:
    """Rounds that each repeat 40 steps of the previous round, after a failure."""
    when, step = began, 0
    yield {"time": when, "event": "start", "run": 0, "job": "1", "granted": 4, "min_nodes": 2, "max_nodes": 4}
    for round in range(1, ROUNDS + 1):
        formed = {"round": round, "nodes": ["n1", "n2"], "world_size": 2, "restarts": round - 1, "leader": "n1"}
        yield {"time": when, "event": "round", **formed}
        step = max(0, step - 40)
        first = {"first": step + 1, "first_at": when + 5}
        for report in range(REPORTS):
            when, step = when + 10, step + 100
            loss = {"loss": 1.0 + report} if report % 5 == 0 else {}
            yield {
                "time": when,
                "event": "progress",
                "round": round,
                "step": step,
                "step_at": when - 1,
                **first,
                **loss,
            }
        failed = {"node": "n2", "kind": "exit", "message": "exit code 1", "rank": 1, "traceback": "", "first": True}
        yield {"time": when, "event": "failure", **failed}
        yield {"time": when, "event": "restart", "reason": "rank 1 on n2: exit code 1", "restarts": round}


def write(folder: Path, events: list[dict[str, Any]], node: str = "n1", mode: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / f"events.{node}.jsonl", mode) as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def outline(story: Story) -> Story:
    """The story with only the first and last sample of each round, and without losses."""

    def short(round: Round) -> Round:
        return replace(round, samples=tuple(replace(s, loss=None) for s in (*round.samples[:1], *round.samples[-1:])))

    return replace(story, rounds=tuple(map(short, story.rounds)))


def test_a_long_record_gives_the_same_story_as_all_of_its_events_and_keeps_only_a_few_samples(home: Path) -> None:
    written = list(days())
    write(home / "job", written)
    record, whole = JobRecord(home / "job"), records.story_in(home / "job")
    story = record.story()
    assert outline(story) == outline(whole)
    assert story.steps_per_second == whole.steps_per_second == pytest.approx(10)
    spent, of_whole = account(story), account(whole)
    assert spent == of_whole
    assert spent.repeated_steps == 40 * (ROUNDS - 1)
    assert all(200 < len(round.samples) < 2100 for round in (*story.rounds, *whole.rounds))
    assert story.rounds[-1].loss is not None
    assert len(record.events) == 1 + 3 * ROUNDS


def test_most_lines_of_a_long_record_are_not_parsed_and_a_further_look_reads_only_what_was_added(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home / "job", list(days()))
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    record = JobRecord(home / "job")
    before = record.story()
    assert len(parsed) < ROUNDS * REPORTS / 10
    parsed.clear()
    at = before.last_time + 10
    write(home / "job", [{"time": at, "event": "waiting", "round": 4, "reason": "2 of 3 nodes"}])
    assert record.story().waiting == "2 of 3 nodes"
    assert len(parsed) == 1
    parsed.clear()
    assert record.story().last_time == at
    assert parsed == []


def test_a_record_that_is_read_as_it_grows_gives_the_same_story_as_when_it_is_read_at_once(home: Path) -> None:
    written = records.events("faults")
    record = JobRecord(home / "job")
    for number in range(0, len(written), 3):
        write(home / "job", written[number : number + 3])
        assert record.story() == story_of(written[: number + 3])


def test_late_events_of_an_earlier_leader_take_their_place_in_the_story(home: Path) -> None:
    written = records.events("head")
    round, takes_over = ([event["event"] for event in written].index(name) for name in ("round", "take_over"))
    late = written[round:takes_over]
    write(home / "job", written[:round], "n1")
    write(home / "job", written[takes_over:], "n2")
    record = JobRecord(home / "job")
    assert record.story() != story_of(written)
    write(home / "job", late, "n1")
    assert record.story() == story_of(written)


def test_a_record_that_replaces_another_is_read_from_its_beginning(home: Path) -> None:
    write(home / "job", records.events("faults"))
    record = JobRecord(home / "job")
    record.story()
    other = records.events("cancelled")
    write(home / "job", other, mode="w")
    assert record.story() == story_of(other)


def job(home: Path, name: str, outcome: str, ended: float) -> Path:
    """A job with an unreadable record, so that reading its events raises an error."""
    folder = home / "jobs" / name
    (folder / "events.n1.jsonl").mkdir(parents=True)
    verdict = {"run": 0, "outcome": outcome, "cause": "", "reason": "all workers finished", "failure": None}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    os.utime(folder / "verdict.json", (ended, ended))
    remember(folder)
    return folder


def test_status_does_not_open_the_records_of_jobs_that_ended_long_ago(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        job(home, str(number), "finished", time.time() - 100_000)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "No active jobs (--all shows finished ones)\n"
    assert main(["status", "--all"]) == 1
    assert main(["metrics"]) == 0
    capsys.readouterr()
    of_today = job(home, "20", "finished", time.time() - 1000)
    assert main(["status"]) == 1
    assert f"{of_today}/events.n1.jsonl: Is a directory" in capsys.readouterr().out


@pytest.mark.parametrize("outcome", ["requeue", "finished"])
def test_a_job_that_waits_for_days_after_a_requeue_or_has_a_leader_again_is_not_left_out(
    home: Path, capsys: pytest.CaptureFixture[str], outcome: str
) -> None:
    folder = job(home, "7", outcome, time.time() - 300_000)
    if outcome == "finished":  # a leader of another run is active and has no verdict yet
        (folder / "heartbeat").touch()
    assert main(["status"]) == 1
    assert "Is a directory" in capsys.readouterr().out


def test_status_into_a_pipe_cuts_no_path_and_leaves_out_no_column(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = records.copy("grown", home / ("long" * 30))
    assert main(["status", str(folder)]) == 0
    assert f"record    {folder}" in capsys.readouterr().out
    other = records.copy("faults", home)
    assert main(["status", str(folder), str(other)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "round"


def test_logs_into_a_pipe_are_written_without_rich(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = records.copy("cancelled", home)
    path = folder / "logs" / "0.1" / "n9.rank9.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"[/]step {number} \\ {'x' * 90}" for number in range(3000)]
    path.write_bytes(b"".join(label(9, "out", 1e9 + n) + line.encode() + b"\n" for n, line in enumerate(lines)))
    printed: list[object] = []
    monkeypatch.setattr(Console, "print", lambda *what, **_: printed.append(what))
    assert main(["logs", str(folder), "--rank", "9"]) == 0
    assert capsys.readouterr().out == "".join(f"rank 9| {line}\n" for line in lines)
    assert len(printed) == 1  # the heading of the round


def test_the_time_of_joined_nodes_is_counted_from_their_start_to_their_end_even_if_they_are_many() -> None:
    story = records.story("faults")
    begin, end = story.runs[0].began, story.last_time
    shuffled = random.Random(7)
    moments = [[shuffled.uniform(begin - 20, end + 20) for _ in range(2)] for _ in range(200)]
    joiners = [JoinedNode(f"j{n}", *times) for n, times in enumerate(moments)] + [JoinedNode("stays", begin + 1)]
    of_joiners = sum(
        max(0.0, min(phase.end, end if node.left is None else node.left) - max(phase.start, node.joined))
        for phase in phases(story)
        for node in joiners
        if phase.kind != "queue"
    )
    added = account(replace(story, joiners=tuple(joiners))).total - account(story).total
    # nodes that no world uses count as idle; no joiner trains here, so each of their seconds is added
    assert added == pytest.approx(of_joiners)


def test_the_page_and_the_reasons_of_a_job_of_two_thousand_rounds_are_made_quickly(home: Path) -> None:
    when, written = 1e9, [next(days())]
    for number in range(1, 2001):
        formed = {"round": number, "nodes": ["n1", "n2"], "world_size": 2, "restarts": number - 1, "leader": "n1"}
        progress = {"round": number, "first": 1, "first_at": when + 5, "loss": 0.5}
        written += [
            {"time": when, "event": "round", **formed},
            {"time": when, "event": "hang_timeout", "seconds": 60.0, "reason": "learned"},
            *({"time": when + 10 * n, "event": "progress", **progress, "step": n, "step_at": when} for n in (1, 2)),
            {"time": when + 100, "event": "restart", "reason": f"cause {number}", "restarts": number},
        ]
        when += 100
    write(home / "job", written)
    ((view, story, events),) = Jobs([RunDir(home / "job")]).look()
    begin = time.process_time()
    text = why(Look(view, story, events))
    html(view, story, when)
    assert time.process_time() - begin < 2.5  # 3.6 s where each round looks at all events
    assert text.count("cause ") == 2000


def test_a_look_at_a_month_with_a_thousand_joined_nodes_is_quick(home: Path) -> None:
    when, written = 1e9, [next(days())]
    for number in range(1000):
        formed = {"round": number, "nodes": ["n1", "n2"], "world_size": 2, "restarts": 0, "leader": "n1"}
        written += [
            {"time": when, "event": "join", "node": f"j{number}", "joiner": True},
            {"time": when + 1, "event": "round", **formed},
            {"time": when + 2000, "event": "left", "node": f"j{number}", "reason": "preempted"},
            {"time": when + 2001, "event": "restart", "reason": "a node has to go", "restarts": 0},
        ]
        when += 2600
    write(home / "job", written)
    record = JobRecord(home / "job")
    record.story()
    begin = time.process_time()
    spent = account(record.story())
    assert time.process_time() - begin < 0.5  # it took 1 s when each phase visited each node
    assert spent.total > 0
