"""``elastic-hpc why``: the page from records of real jobs, and its advice."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.membership.events import sentence
from elastic_hpc.view.story import Fault, Story
from elastic_hpc.view.story_builder import story_of
from elastic_hpc.view.why import advice


def page(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["why", str(records.FOLDER / name)]) == 0
    return capsys.readouterr().out


def advised(name: str, **changes: Any) -> str:
    from test_status import ended

    from elastic_hpc.view.job import view

    story: Story = replace(records.story(name), **changes)
    return "\n".join(advice(view(ended("failed"), story, story.last_time), story))


def test_the_end_of_each_round_is_shown_with_cause_traceback_charge_and_action(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = page("faults", capsys)
    for part in (
        "COMPLETED",
        "restarts charged: 2 of 10; requeues charged: 0 of 5",
        "run 1, ",
        "round 1, ",
        "by: rank 2 on n3: ValueError: sample",
        "in load_batch\n",
        "charged: restart 1 (--max-restarts)",
        "next: new round on the same nodes",
        "8 of its steps were repeated: the last checkpoint was of step 60",
        "by: n3 lost: no heartbeat for 5 s",
        "next: new round without n3",
        "drain requested: time limit",
        "by: time limit: the workers saved and stopped",
        "charged: nothing; next: the job returned to the queue under its own ID",
        "run 2, ",
        "steps that were kept",
    ):
        assert part in text, part


@pytest.mark.parametrize("name", records.NAMES)
def test_the_json_has_the_content_of_the_page_and_every_field_is_documented(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(name, capsys)
    assert main(["why", "--json", str(records.FOLDER / name)]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["job"]["state"] in text
    assert [f"{round['number']}" for round in body["rounds"]] == re.findall(r"^round (\d+), ", text, re.MULTILINE)
    for round in body["rounds"]:
        assert round["cause"] in text
        for fault in round["faults"][:1]:
            assert fault["traceback"].rstrip().replace("\n", "\n  ") in text
    assert all(f"  * {line}" in text for line in body["advice"])
    told = {event["text"] for event in body["events"]}
    assert set(re.findall(r"^  \d\d:\d\d:\d\d  (.*)$", text, re.MULTILINE)) <= told
    documented = (records.FOLDER.parents[1] / "docs" / "status.md").read_text()
    parts = [body, *body["runs"], *body["rounds"], *(fault for round in body["rounds"] for fault in round["faults"])]
    missing = {field for part in parts for field in part} - set(re.findall(r"`(\w+)`", documented))
    assert not missing


def test_the_loss_of_the_leader_is_shown_with_the_node_that_took_over(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("head", capsys)
    assert "by: n1 lost: no heartbeat for 5 s" in text
    assert "this node leads now: n1 lost" in text
    assert "next: new round without n1" in text


def test_growth_is_shown_with_the_submitted_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("grown", capsys)
    assert "requested 2 more node(s) from Slurm: job(s)" in text
    assert "next: new round with n" in text


def test_a_restart_in_place_is_shown_with_the_number_of_workers_that_kept_their_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = records.events("faults")
    formed = [number for number, event in enumerate(events) if event["event"] == "round"][1]
    events = [event for event in events if event["event"] != "started"]
    kept = {"kept": 2, "warm": 1, "cold": 0, "why": [], "standby_mb": 0.0}
    events.insert(formed + 1, {**events[formed], "event": "started", **kept})
    story = story_of(events)
    after = story.rounds[1]
    assert (after.workers_kept, story.rounds[0].in_place) == (2, "")
    assert after.in_place == f"in place: 2 of {after.world_size} workers kept their process"
    said = "in place: 2 of 3 workers kept their process; 1 of 1 other workers were standbys"
    assert sentence("started", kept) == said
    folder = records.copy("faults", tmp_path)
    for path in folder.glob("events*.jsonl"):
        path.unlink()
    records.write(folder, events)
    assert main(["why", str(folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert said in text
    assert f", {after.in_place} 8 of its steps were repeated round 2" in text
    assert main(["timeline", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert f"; the next one {after.in_place}</title>" in page
    assert f"{after.world_size}, 2 in place</td>" in page


def test_for_a_script_that_cannot_run_the_advice_is_to_repair_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("broken", capsys)
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'data/train.bin'" in text
    assert "fix the script: it failed twice in the same way without a step in between" in text
    assert "elastic-hpc logs broken --round last --rank 0" in text


def test_collateral_failures_are_shown_as_such() -> None:
    from rich.console import Console
    from test_status import ended

    from elastic_hpc.view.job import view
    from elastic_hpc.view.why import page

    story = records.story("faults")
    echo = Fault(0.0, "n1", "exception", "RuntimeError: Connection closed by peer", rank=0)
    first = replace(story.rounds[0], faults=(*story.rounds[0].faults, echo))
    story = replace(story, rounds=(first, *story.rounds[1:]))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(page(view(ended(), story, story.last_time), story, records.events("faults")))
    assert "collateral: rank 0 on n1: RuntimeError: Connection closed by peer" in shown.get()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("out of memory", "request more memory (--mem)"),
        ("hang", "stacks"),
        ("signal", "report n3 to your administrator"),
    ],
)
def test_the_advice_fits_the_cause(kind: str, expected: str) -> None:
    story = records.story("faults")
    rounds = tuple(
        replace(one, faults=(replace(one.faults[0], kind=kind),)) if one.faults else one for one in story.rounds
    )
    told = advised("faults", rounds=rounds)
    assert expected in told
    assert kind != "out of memory" or "administrator" not in told, "no node is to blame for a job's use of memory"


def test_a_node_that_failed_repeatedly_is_named_unless_the_script_was_at_fault() -> None:
    event = {"time": 1.0, "event": "barred", "node": "n7", "reason": "CUDA error; the same failure on the same node"}
    barred = story_of([event]).barred
    assert sentence("barred", event) == "n7 stays out: CUDA error; the same failure on the same node"
    said = "report n7 to your administrator: workers failed repeatedly, and only there; exclude the node: --exclude n7"
    assert said in advised("faults", barred=barred)
    run = records.story("broken").runs[-1]
    assert said not in advised("faults", barred=barred, runs=(run,))


def test_nodes_that_do_not_reach_each_other_are_named_once() -> None:
    event = {"time": 1.0, "event": "apart", "round": 1, "pairs": [["n2", "n3"]]}
    event["reason"] = "n2 and n3 do not reach each other"
    story = story_of([event, event])
    assert sentence("apart", event) == "n2 and n3 do not reach each other"
    assert (
        advised("faults", apart=story.apart).count("report to your administrator: n2 and n3 do not reach each other")
        == 1
    )


def test_a_node_excluded_only_for_memory_is_not_called_broken() -> None:
    story = records.story("faults")
    fault, other = story.rounds[0].faults[0], story.rounds[1]

    def told(*kinds: str) -> str:
        rounds = [replace(story.rounds[0], faults=(replace(fault, node="n7", kind=kind),)) for kind in kinds]
        return advised("faults", barred=("n7",), rounds=(*rounds, other))

    memory = told("out of memory", "out of memory")
    assert "memory ran out repeatedly, only on n7: that node has less memory, or its workers need more" in memory
    assert "--exclude n7" in memory
    assert "administrator" not in memory
    assert "report n7 to your administrator" in told("out of memory", "signal")


def test_for_a_job_without_remaining_budget_the_page_names_the_budget() -> None:
    run = replace(
        records.story("faults").runs[-1], outcome="failed", cause="budget", reason="all 2 restarts are used up"
    )
    assert "--max-restarts" in advised("faults", runs=(run,))


def test_for_frequently_repeated_steps_the_advice_is_more_checkpoints() -> None:
    story = records.story("faults")
    again = replace(story.rounds[1], first=1)
    assert "save more often" in advised("faults", rounds=(story.rounds[0], again, *story.rounds[2:]))
    assert "save more often" not in advised("faults")


def test_a_record_without_a_round_also_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job").mkdir()
    assert main(["why", str(tmp_path / "job")]) == 0
    assert "no world was formed" in capsys.readouterr().out
