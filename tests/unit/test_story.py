"""The story of a job, from whole and damaged records of real jobs with real faults."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import records

from elastic_hpc.membership.events import EVENTS, sentence
from elastic_hpc.record.events import EventReader, append_event
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.account import MEANINGS, account, phases
from elastic_hpc.view.story_builder import story_of


def test_every_event_of_the_records_is_documented_with_its_fields() -> None:
    for name in records.NAMES:
        for event in records.events(name):
            fields = set(event) - {"time", "event"}
            known = {field for names in EVENTS[event["event"]][1] for field in names.split(", ")}
            if event["event"] == "start":  # the limits need no documentation
                fields = {field for field in fields if field in {"version", "run", "job", "granted", "nproc_per_node"}}
            assert fields <= known | {"time", "actor", "run"}, event


def test_every_event_has_a_sentence_without_its_time() -> None:
    for name in records.NAMES:
        for event in records.events(name):
            assert str(event["time"]) not in sentence(event["event"], event)


def test_the_rounds_of_a_job_with_a_failed_worker_a_lost_node_and_a_requeue() -> None:
    story = records.story("faults")
    assert [len(one.nodes) for one in story.rounds] == [4, 4, 3, 4]
    assert [one.run for one in story.rounds] == [0, 0, 0, 1]
    assert [one.charged for one in story.rounds] == [True, True, False, False]
    assert [(fault.node, fault.kind, fault.rank) for one in story.rounds for fault in one.faults] == [
        ("n3", "exception", 2),
        ("n3", "node lost", None),
    ]
    assert "damaged" in story.rounds[0].faults[0].traceback
    assert [run.outcome for run in story.runs] == ["requeue", "finished"]
    assert story.runs[0].cause == "time limit"
    assert not story.runs[0].charged
    assert (story.restarts, story.requeues, story.damaged) == (2, 0, 0)
    firsts, lasts = [one.first for one in story.rounds], [one.last for one in story.rounds]
    assert firsts[0] == 1
    assert lasts[-1] == 400
    assert sum(map(story.kept, story.rounds)) == 400
    assert sum(map(story.repeated, story.rounds)) == sum(lasts) - sum(firsts) + 4 - 400


def test_a_verdict_that_a_leader_has_withdrawn_has_ended_nothing() -> None:
    before = [event for event in records.events("faults") if event.get("run", 0) == 0]
    before = before[: next(index for index, event in enumerate(before) if event["event"] == "restart")]
    last = before[-1]["time"]
    verdict = {"outcome": "requeue", "cause": "node lost", "reason": "no leader was found", "failure": None}
    verdict |= {"round": 1, "restarts": 0, "requeues": 1, "time": last + 1, "event": "verdict"}
    withdrawn = {"node": "n3", "reason": "no leader was found", "time": last + 9, "event": "withdrawn"}
    said, untouched = story_of([*before, verdict, withdrawn]), story_of(before)
    assert (said.runs, said.rounds, said.requeues, said.waiting_since) == (
        untouched.runs, untouched.rounds, untouched.requeues, untouched.waiting_since,
    )  # fmt: skip
    assert story_of([*before, verdict]).runs != said.runs


def test_a_node_without_power_counts_as_lost_from_its_last_heartbeat() -> None:
    lost = records.story("faults").rounds[1]
    assert lost.broken is not None
    assert lost.ended is not None
    assert lost.ended - lost.broken == pytest.approx(5.0, abs=0.5)
    assert records.story("faults").rounds[2].gap == pytest.approx(5.0, abs=0.5)


def test_the_loss_of_the_leader_is_shown_although_no_leader_could_record_it() -> None:
    story = records.story("head")
    first, second = story.rounds
    assert (first.leader, second.leader) == ("n1", "n2")
    (fault,) = first.faults
    assert (fault.node, fault.kind, fault.message) == ("n1", "node lost", "no heartbeat for 5 s")
    assert second.first is not None
    assert first.last is not None
    assert first.last >= second.first - 1, "who goes on there had a checkpoint of it"
    assert sum(map(story.kept, story.rounds)) == 240


def test_joiners_are_counted_while_they_are_present() -> None:
    story = records.story("grown")
    assert [len(one.nodes) for one in story.rounds] == [2, 3, 4, 3]
    assert {one.node for one in story.joiners} == {"n3", "n4"}
    assert all(one.left is not None and one.left > one.joined for one in story.joiners)
    assert story.runs[0].granted == 2


def test_the_reason_why_no_further_nodes_come_is_shown_until_one_comes() -> None:
    events = records.events("grown")
    begins = next(at for at, event in enumerate(events) if event["event"] == "round") + 1
    problem = {"time": events[begins - 1]["time"], "event": "growth_problem", "reason": "joiner 5: AssocMaxJobsLimit"}
    assert story_of([*events[:begins], problem]).not_growing == problem["reason"]
    assert story_of([*events[:begins], problem, *events[begins:]]).not_growing == ""


def test_a_script_that_cannot_run_has_two_rounds_without_a_step() -> None:
    story = records.story("broken")
    assert [one.first for one in story.rounds] == [None, None]
    assert story.runs[0].outcome == "failed"
    assert "the same failure as before" in story.runs[0].reason
    assert account(story).goodput is None


def test_scancel_is_shown_as_such() -> None:
    assert (records.story("cancelled").runs[-1].cause, records.story("cancelled").runs[-1].reason) == (
        "user",
        "scancel",
    )


@pytest.mark.parametrize("name", records.NAMES)
def test_all_node_time_is_accounted_for(name: str) -> None:
    story = records.story(name)
    told = phases(story)
    assert all(before.end <= after.start + 1e-6 for before, after in pairwise(told))
    counted = account(story)
    own = sum(
        run.granted * phase.seconds
        for run in story.runs
        for phase in told
        if phase.run is run and phase.kind != "queue"
    )
    joined = sum((one.left or 0) - one.joined for one in story.joiners)
    assert counted.total == pytest.approx(own + joined, abs=1.0)
    assert set(counted.node_seconds) <= set(MEANINGS)
    assert counted.ran == pytest.approx(sum(p.seconds for p in told if p.kind != "queue"))
    assert 0 <= counted.lost < counted.ran


def test_goodput_is_the_share_of_kept_steps() -> None:
    counted = account(records.story("faults"))
    assert counted.goodput == pytest.approx(counted.node_seconds["kept"] / counted.total)
    assert 0.05 < counted.goodput < 0.95
    assert counted.node_seconds["repeated"] > 0
    assert counted.queued > 1


def test_the_time_of_a_running_job_continues() -> None:
    running = [event for event in records.events("grown") if event["event"] != "verdict"]
    story = story_of(running)
    assert story.current
    counted = [account(story, story.last_time + seconds) for seconds in (0, 100)]
    assert counted[1].ran == pytest.approx(counted[0].ran + 100)
    assert counted[1].node_seconds["kept"] > counted[0].node_seconds["kept"] + 100


@pytest.mark.parametrize(
    ("outcome", "job", "queued"), [("failed", "9", 15.0), ("requeue", "9", 615.0), ("", "7", 615.0)]
)
def test_the_time_from_an_end_to_the_submission_that_resumes_the_job_is_no_time_in_the_queue(
    outcome: str, job: str, queued: float
) -> None:
    """Where a site requeues no jobs, the leader submits the job again, as another Slurm job: that is a requeue."""
    begin = {"event": "start", "granted": 2}
    allocation: dict[str, Any] = {"event": "allocation", "ends": None}
    verdict = {"event": "verdict", "outcome": outcome, "cause": "", "reason": "", "restarts": 0, "requeues": 0}
    story = story_of(
        [
            {"time": 1000.0, **begin, "run": 0, "job": "7"},
            {"time": 1000.0, **allocation, "run": 0, "submitted": 995.0, "started": 1000.0},
            {"time": 1100.0, **verdict},
            {"time": 1710.0, **begin, "run": 1, "job": job},
            {"time": 1710.0, **allocation, "run": 1, "submitted": 1700.0, "started": 1710.0},
        ]
    )
    assert account(story).queued == queued
    assert story.resumed == ({1} if outcome == "failed" else set())


def test_a_job_whose_next_step_is_overdue_has_no_speed() -> None:
    story = story_of([event for event in records.events("grown") if event["event"] != "verdict"])
    assert story.current
    assert story.no_step_for(story.current.last_at + 19) is None
    assert story.no_step_for(story.current.last_at + 45) == pytest.approx(45)
    assert records.story("grown").no_step_for(1e12) is None, "it has ended"


def test_the_speed_is_that_of_the_round_that_trains() -> None:
    assert records.story("faults").steps_per_second == pytest.approx(17, abs=5)
    assert records.story("broken").steps_per_second is None


@pytest.mark.parametrize("name", records.NAMES)
def test_a_record_without_any_one_of_its_lines_still_gives_a_story(name: str) -> None:
    whole, dice = records.events(name), random.Random(name)
    for _ in range(200):
        left = [event for event in whole if dice.random() < 0.7]
        story = story_of(left)
        account(story)
        assert [one.number for one in story.rounds] == [event["round"] for event in left if event["event"] == "round"]


@pytest.mark.parametrize("name", records.NAMES)
def test_a_record_of_another_version_gives_a_story_as_far_as_it_is_understood(name: str) -> None:
    whole, dice = records.events(name), random.Random(name)
    for _ in range(200):
        changed = []
        for event in whole:
            made = {
                field: value for field, value in event.items() if field in {"time", "event"} or dice.random() < 0.95
            }
            for field in list(made):
                if field not in {"time", "event"} and dice.random() < 0.05:
                    made[field] = dice.choice([None, "?", [], {}, -1])
            changed.append({**made, "new": {"field": 1}})
        changed.append({"time": whole[-1]["time"], "event": "of a later version"})
        story = story_of(changed)
        account(story)
        phases(story)


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    whole = (folder / "events.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[3] = lines[3][:20] + b"\n"
    lines[5] = b"\xff\xfe\x00 not JSON\n"
    (folder / "events.jsonl").write_bytes(b"".join(lines) + b'{"time": 1, "event": "rou')
    story = records.story_in(folder)
    assert story.damaged == 2
    assert story.runs[-1].outcome == "finished"


def test_the_events_of_several_leaders_are_merged_by_time_as_they_are_written(tmp_path: Path) -> None:
    """The first leader is cut off, and writes its events later, when the others have continued."""
    reader = EventReader(tmp_path)

    def write(node: str, *times: float) -> list[float]:
        for when in times:
            append_event(tmp_path, node, when, "progress", {})
        return [event["time"] for event in reader.read()]

    (tmp_path / "events.jsonl").write_text('{"time": 0, "event": "start"}\n')  # of an earlier version
    assert write("n1", 1.0, 2.0) == [0, 1.0, 2.0]
    assert write("n2", 4.0, 6.0) == [4.0, 6.0]
    assert write("n1", 3.0, 5.0) == [3.0, 5.0]
    assert write("n2") == []
    assert [event["time"] for event in reader.events] == [0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert RunDir(tmp_path).events() == reader.events


def test_a_record_is_read_as_it_grows(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    reader = EventReader(rundir.path)
    assert not reader.read()
    lines = (records.FOLDER / "faults" / "events.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_bytes(lines[:300])
    assert not reader.read() or len(reader.events) == lines[:300].count(b"\n")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(lines[300:])
    assert reader.read()
    assert not reader.read()
    assert reader.events == records.events("faults")
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": 1.0, "event": "join"}) + "\n")
    reader.read()
    assert [event["event"] for event in reader.events] == ["join"]


def test_the_story_shows_the_hang_timeout_and_its_reason() -> None:
    start = {"time": 1.0, "event": "start", "run": 0, "job": "1", "granted": 2, "version": "1"}
    learned = {"time": 9.0, "event": "hang_timeout", "seconds": 420.0, "reason": "10 times the longest silence so far"}
    story = story_of([{**start, "hang_timeout": None}, learned])
    assert (story.hang_timeout, story.hang_timeout_reason) == (420.0, "10 times the longest silence so far")
    given = story_of([{**start, "hang_timeout": 15.0}])
    assert (given.hang_timeout, given.hang_timeout_reason) == (15.0, "given by --hang-timeout")
    assert story_of([start]).hang_timeout is None


def test_the_story_shows_slow_nodes_until_they_are_fast_again_or_have_left() -> None:
    def round_of(*nodes: str) -> dict[str, Any]:
        world = {"round": 1, "nodes": nodes, "world_size": 3, "restarts": 0, "leader": "n1"}
        return {"time": 2.0, "event": "round", **world}

    start = {"time": 1.0, "event": "start", "run": 0, "job": "1", "granted": 3, "version": "1"}
    slow = [
        {"time": 3.0, "event": "slow", "node": node, "times": times, "reason": f"slow node: {times}"}
        for node, times in (("n2", 1.7), ("n3", 2.5))
    ]
    so_far = [start, round_of("n1", "n2", "n3"), *slow]
    assert story_of(so_far).slow == {"n2": 1.7, "n3": 2.5}
    assert story_of([*so_far, {"time": 4.0, "event": "slow_over", "node": "n2"}]).slow == {"n3": 2.5}
    left = story_of([*so_far, round_of("n1", "n2")])
    assert left.slow == {"n2": 1.7}
    assert left.was_slow == ("n2: slow node: 1.7", "n3: slow node: 2.5")
