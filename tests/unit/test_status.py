"""``elastic-hpc status`` and its parts: never shows a job healthier than the known facts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import records
from rich.console import Console

from elastic_hpc import slurm
from elastic_hpc.cli.hpc import main
from elastic_hpc.job.look import Jobs
from elastic_hpc.record.registry import remember, with_tasks
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm import Queued
from elastic_hpc.view.job import SCHEMA, JobView, as_json, view
from elastic_hpc.view.metrics import JobMetrics
from elastic_hpc.view.state import Observed
from elastic_hpc.view.status import card, table
from elastic_hpc.view.story import Story
from elastic_hpc.view.story_builder import story_of
from elastic_hpc.view.times import clock, span
from elastic_hpc.view.why import page


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return records.alone(tmp_path, monkeypatch)


def seen(**changes: Any) -> Observed:
    unset: dict[str, Any] = {"id": "4711", "slurm_id": "4711", "run_dir": "elastic-logs/4711", "script": "train.py"}
    return Observed(**{**unset, "silent": 0.5, "queued": Queued("RUNNING", 4000.0, "None"), **changes})


def ended(outcome: str = "finished", **changes: Any) -> Observed:
    verdict = {"outcome": outcome, "cause": "", "reason": "all workers finished", "failure": None, "run": 0}
    return seen(verdict={**verdict, **changes})


def running(name: str = "grown") -> Story:
    return story_of(event for event in records.events(name) if event["event"] != "verdict")


def shown(what: Any, width: int = 150) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(what)
    console.file.close()
    return console.export_text()


def test_a_running_job_is_shown_with_its_world_its_budgets_and_its_progress() -> None:
    story = running()
    now = story.last_time + 1
    one = view(seen(queued=Queued("RUNNING", now + 600, "None")), story, now)
    assert (one.state, one.note) == ("RUNNING", "")
    assert (len(one.nodes), one.min_nodes, one.max_nodes, one.joiners) == (3, 2, 4, 1)
    assert (one.round, one.restarts, one.max_restarts, one.requeues, one.max_requeues) == (4, 3, 10, 0, 5)
    assert one.step == 400
    assert one.steps_per_second
    assert one.time_left == pytest.approx(600)
    assert one.lost > 5
    assert one.goodput
    text = shown(card(one))
    for part in (
        "job 4711",
        "RUNNING",
        "3 of 2:4",
        "1 by jobs of their own",
        "3 of 10",
        "steps/s",
        "10 min left",
        "goodput",
    ):
        assert part in text
    later = view(seen(queued=Queued("RUNNING", now + 600, "None")), story, now + 300)
    assert "no step for 5 min" in shown(card(later))
    assert "steps/s" not in shown(table([later, later]))
    resumed = replace(one, runs=4, resumed=2)
    assert "1 in all, resumed 2 times" in shown(card(resumed))


def test_a_job_that_has_run_at_several_sizes_shows_its_speed_at_each_and_its_scaling() -> None:
    at = 1000.0
    events: list[dict[str, Any]] = [{"time": at, "event": "start", "run": 0, "job": "1", "granted": 4}]
    for number, (nodes, steps) in enumerate([(2, 100), (4, 150), (2, 100)], 1):
        names = [f"n{node}" for node in range(nodes)]
        formed = {"round": number, "nodes": names, "world_size": nodes, "restarts": 0, "leader": "n0"}
        events.append({"time": at, "event": "round", **formed})
        progress = {"event": "progress", "round": number, "first": 1, "first_at": at + 10}
        for step in (1, steps + 1):
            when = at + 10 + (step > 1) * 10
            events.append({"time": when, **progress, "step": step, "step_at": when})
        events.append({"time": at + 20, "event": "restart", "reason": "growth", "restarts": 0})
        at += 20
    one = view(seen(), story_of(events), at)
    assert one.speeds == {2: 10.0, 4: 15.0}
    assert one.efficiency == {2: 1.0, 4: 0.75}
    assert "2 nodes 10.00 steps/s, 4 nodes 15.00 steps/s (efficiency 75%)" in shown(card(one))
    assert "efficiency" not in shown(card(view(seen(), running("broken"), at)))


def test_a_waiting_job_shows_slurms_expected_start_or_that_there_is_none() -> None:
    waits = view(seen(queued=Queued("PENDING", None, "Resources", 2500.0)), Story(), 1000.0)
    assert waits.starts_in == 1500
    assert "starts    in 25 min, as Slurm estimates" in shown(card(waits))
    assert "4711 Resources; starts in 25 min, as Slurm estimates" in shown(table([waits]))
    unknown = view(seen(queued=Queued("PENDING", None, "Priority", None)), Story(), 1000.0)
    assert unknown.starts_in is None
    assert "unknown: Slurm has no estimate yet" in shown(card(unknown))
    assert "; starts" not in shown(table([unknown]))
    assert view(seen(queued=Queued("RUNNING", None, "None", 900.0)), running(), 1000.0).starts_in is None


def test_if_slurm_does_not_answer_no_job_is_shown_as_healthy() -> None:
    one = view(seen(queued=None, problem="Slurm cannot be asked: timed out"), running(), time.time())
    assert one.state == "UNKNOWN"
    assert "Slurm cannot be asked: timed out" in one.note
    assert "a leader was active 0.5 s ago" in one.note
    assert one.time_left is None
    assert one.steps_per_second is None


def test_a_job_that_slurm_has_forgotten_and_whose_record_has_no_end_was_cut_off() -> None:
    one = view(seen(queued=None), running(), time.time())
    assert (one.state, one.note) == (
        "UNKNOWN",
        "Slurm no longer knows the job, and its record has no end",
    )


def test_a_job_that_was_cancelled_while_it_waited_after_a_requeue() -> None:
    events = records.events("faults")
    first = story_of(events[: next(i for i, event in enumerate(events) if event["event"] == "verdict") + 1])
    one = view(seen(queued=None), first, time.time())
    assert one.state == "UNKNOWN"
    assert "it was cancelled in the queue" in one.note
    waits = view(seen(queued=Queued("PENDING", None, "BeginTime")), first, time.time())
    assert (waits.state, waits.note) == (
        "PENDING",
        "BeginTime; it was requeued: time limit: the workers saved and stopped",
    )


def test_a_running_job_without_a_leader_is_shown_as_such() -> None:
    now = time.time()
    assert view(seen(silent=65.0), running(), now).note == "it has had no leader for 1 min 5 s"
    assert view(seen(silent=None), Story(), now).note == "it is starting: no agent has started on its first node yet"


def test_a_running_job_shows_why_no_further_nodes_come() -> None:
    told = view(seen(), replace(running(), not_growing="joiner 5: AssocMaxJobsLimit"), time.time())
    assert (told.state, told.note) == ("RUNNING", "no further nodes: joiner 5: AssocMaxJobsLimit")


def test_a_running_job_without_a_world_names_what_it_waits_for_and_shows_no_node_of_the_previous_run() -> None:
    events = list(records.events("faults"))
    again = next(i for i, event in enumerate(events) if event["event"] == "start" and event["run"] == 1)
    start = events[again]
    waits = {"event": "waiting", "round": 9, "reason": "2 of at least 3 nodes are here; not joined yet: n3"}
    until_now = [*events[: again + 1], {**waits, "time": start["time"] + 1}]
    story = story_of(until_now)
    one = view(seen(), story, start["time"] + 5)
    assert one.note == f"waiting since {clock(start['time'])}: 2 of at least 3 nodes are here; not joined yet: n3"
    assert (one.nodes, one.world_size, one.leader) == ((), 0, "")
    assert f"0 of {one.min_nodes}:{one.max_nodes}" in shown(table([one]))
    assert "not joined yet: n3" in shown(page(one, story, until_now)).partition("run 2")[2]


def test_a_job_names_a_missing_node_and_the_reason_until_the_node_is_back() -> None:
    start = {"run": 0, "job": "7", "granted": 3}
    formed = {"world_size": 2, "restarts": 0, "leader": "n1"}
    events: list[dict[str, Any]] = [
        {"event": name, "time": float(when), **event}
        for when, (name, event) in enumerate(
            (
                ("start", start),
                ("join", {"node": "n1"}),
                ("join", {"node": "n2"}),
                ("absent", {"node": "n3", "reason": "Slurm allocated the node, but its agent never connected"}),
                ("round", {"round": 1, "nodes": ["n1", "n2"], **formed}),
                ("lost", {"node": "n2", "reason": "no heartbeat for 5 s", "round": 1, "silent": 5.0}),
            )
        )
    ]
    never = {"n3": "Slurm allocated the node, but its agent never connected"}
    assert view(seen(), story_of(events), 6.0).missing == {**never, "n2": "no heartbeat for 5 s"}
    text = shown(card(view(seen(), story_of(events[:5]), 6.0)))
    assert "missing n3: Slurm allocated the node, but its agent never connected" in " ".join(text.split())
    assert "lost nothing" not in " ".join(text.split())
    again: dict[str, Any] = {"event": "join", "time": 7.0, "node": "n2"}
    assert view(seen(), story_of([*events, again]), 8.0).missing == never
    took_over = {"event": "take_over", "time": 7.0, "round": 2, "reason": "n1 lost: Connection reset by peer"}
    assert view(seen(), story_of([*events[:4], took_over]), 8.0).missing == {**never, "n1": "Connection reset by peer"}
    requeued = {"event": "start", "time": 9.0, **start, "run": 1}
    assert view(seen(), story_of([*events, requeued]), 10.0).missing == {}


def test_nodes_that_are_about_to_fail_are_shown_with_the_reason_until_they_may_stay() -> None:
    begin = {"time": 1.0, "event": "start", "run": 0, "job": "7", "granted": 3, "min_nodes": 2, "max_nodes": 3}
    drained = {"time": 2.0, "event": "leave", "node": "n2", "reason": "drained in Slurm: ECC", "exclude": True}
    needed = {"time": 3.0, "event": "stays", "node": "n3", "reason": "Xid 79", "why": "1 node(s) are left"}
    wanted = {"time": 4.0, "event": "leave", "node": "n1", "reason": "the user releases it", "exclude": False}
    undone = {"time": 5.0, "event": "stay", "node": "n2", "reason": "drained in Slurm: ECC"}
    bad = {"n2": "drained in Slurm: ECC", "n3": "Xid 79; it stays: 1 node(s) are left"}
    assert view(seen(), story_of([begin, drained, needed, wanted]), 6.0).missing == bad
    assert view(seen(), story_of([begin, drained, needed, wanted, undone]), 6.0).missing == {"n3": bad["n3"]}
    world: dict[str, Any] = {"time": 5.0, "event": "round", "round": 2, "world_size": 3, "restarts": 0, "leader": "n1"}
    kept, left = ({**world, "nodes": nodes} for nodes in (["n1", "n3", "n4"], ["n1", "n4", "n5"]))
    assert view(seen(), story_of([begin, drained, needed, kept]), 6.0).missing == bad
    assert view(seen(), story_of([begin, drained, needed, left]), 6.0).missing == {**bad, "n3": "Xid 79"}


def test_a_job_whose_nodes_slurm_prepares_or_cleans_is_shown_as_such() -> None:
    assert "prolog" in view(seen(queued=Queued("CONFIGURING", None, "Prolog")), Story(), 0.0).note
    assert "epilog" in view(seen(queued=Queued("COMPLETING", None, "None")), running(), 0.0).note


def test_a_job_that_has_not_started_shows_what_it_waits_for() -> None:
    one = view(seen(queued=Queued("PENDING", None, "Resources"), script="", silent=None), Story(), time.time())
    assert (one.state, one.note, one.round, one.step) == ("PENDING", "Resources", 0, None)
    assert "Resources" in shown(card(one))
    assert "PENDING" in shown(table([one, one]))


def test_an_ended_job_needs_no_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(records.FOLDER / "broken")]) == 0
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "FileNotFoundError" in text


def test_the_json_has_a_version_and_every_documented_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", *(str(records.FOLDER / name) for name in records.NAMES)]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["schema"] == SCHEMA
    assert body["slurm"] is None
    assert [job["state"] for job in body["jobs"]] == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED", "CANCELLED"]
    for job in body["jobs"]:
        assert list(job) == [field.name for field in fields(JobView)]
    documented = (records.FOLDER.parents[1] / "docs" / "status.md").read_text()
    for field in ("schema", "time", "slurm", "jobs", *(field.name for field in fields(JobView))):
        assert f"`{field}`" in documented


def test_the_json_of_an_active_job_shows_that_slurm_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = records.copy("grown", tmp_path)
    (folder / "verdict.json").unlink()
    records.write(folder, [event for event in records.events("grown") if event["event"] != "verdict"])
    assert main(["status", "--json", str(folder)]) == 1
    body = json.loads(capsys.readouterr().out)
    assert "Slurm cannot be asked" in body["slurm"]
    assert body["jobs"][0]["state"] == "UNKNOWN"


def test_the_problem_that_slurm_does_not_answer_is_dropped_when_all_jobs_have_ended_by_their_records(
    tmp_path: Path,
) -> None:
    folder = records.copy("grown", tmp_path)
    verdict = (folder / "verdict.json").read_bytes()
    (folder / "verdict.json").unlink()
    jobs = Jobs([RunDir(folder)])
    ((watched, *_),) = jobs.look()
    assert (watched.state, bool(jobs.problem)) == ("UNKNOWN", True)
    (folder / "verdict.json").write_bytes(verdict)
    ((watched, *_),) = jobs.look(query_interval=3600)
    assert (watched.state, jobs.problem) == ("COMPLETED", "")


@pytest.mark.parametrize("name", ["verdict.json", "state.json", "spec.json", "endpoint.json", "events.jsonl"])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\x00", b"[]\n", b'{"run": "x", "job": [], "script": 7}\n', None])
def test_a_damaged_file_costs_only_its_own_content(name: str, damage: bytes | None, tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage)
    assert main(["status", str(folder)]) in {0, 1}
    assert main(["why", str(folder)]) == 0
    assert main(["timeline", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert main(["metrics", str(folder), "--output", str(tmp_path / "jobs.prom")]) == 0
    assert main(["logs", str(folder)]) == 0


def test_jobs_are_found_by_id_from_any_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records.copy("faults", home / "elsewhere")
    remember(folder)
    assert main(["status", "faults", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["run_dir"] == str(folder)
    assert main(["status", "nosuchjob"]) == 2
    assert "'nosuchjob': expected the ID of a job" in capsys.readouterr().err
    assert main(["why", str(home / "elastic-logs" / "9")]) == 2


def test_without_a_job_argument_all_active_and_recently_ended_jobs_are_shown(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("faults", "broken"):
        remember(folder := records.copy(name, home / "elastic-logs"))
        records.write(folder, [{**event, "time": event["time"] - 3 * 86400} for event in records.events(name)])
    assert main(["status"]) == 0
    assert "No active jobs" in capsys.readouterr().out
    assert main(["status", "--all"]) == 0
    text = capsys.readouterr().out
    assert text.index("broken") < text.index("faults"), "the job that ended last comes first"
    recent = [
        {**event, "time": event["time"] - records.story("faults").last_time + time.time()}
        for event in records.events("faults")
    ]
    records.write(home / "elastic-logs" / "faults", recent)
    assert main(["status"]) == 0
    assert "faults" in capsys.readouterr().out


def test_active_jobs_stand_above_ended_ones_and_of_these_the_last_comes_first(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for id, ended_ago in (("1", 500.0), ("2", 100.0), ("3", 300.0)):
        remember(folder := records.copy("grown", home / id).rename(home / id / id))
        later = time.time() - ended_ago - records.story("grown").last_time
        records.write(folder, [{**event, "time": event["time"] + later} for event in records.events("grown")])
    for id in ("8", "9"):
        remember(home / "elastic-logs" / id)
    queued = {"8": Queued("PENDING", None, "Resources"), "9": Queued("RUNNING", None, "None")}
    monkeypatch.setattr(slurm, "queue", lambda *_: queued)
    assert main(["status"]) == 0
    assert re.findall(r"(?m)^(\d) ", capsys.readouterr().out)[:5] == ["9", "8", "2", "3", "1"]
    assert main(["status", "--json"]) == 0
    assert [job["id"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["1", "2", "3", "8", "9"]


def test_a_job_that_was_cancelled_in_the_queue_is_shown_while_slurm_knows_it(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(home / "elastic-logs" / "7")
    monkeypatch.setattr(slurm, "show_job", lambda _: None)
    monkeypatch.setattr(slurm, "queue", lambda *_: {"7": Queued("CANCELLED", None, "None")})
    assert main(["status"]) == 0
    assert "job 7  CANCELLED" in capsys.readouterr().out
    monkeypatch.setattr(slurm, "queue", lambda *_: {})
    assert main(["status"]) == 0
    assert "No active jobs" in capsys.readouterr().out


def test_a_job_whose_record_cannot_be_read_does_not_hide_the_others(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("faults", "broken"):
        remember(folder := records.copy(name, home / "elastic-logs"))
        records.write(folder, [{**event, "time": time.time()} for event in records.events(name)])
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    assert main(["status"]) == 1
    text = capsys.readouterr().out
    assert "COMPLETED" in text
    assert "events.jsonl: Is a directory" in text
    assert main(["metrics"]) == 0
    text = capsys.readouterr().out
    assert 'job="faults"' in text
    assert 'job="broken"' not in text, "its counters are not 0"
    assert main(["status", str(folder)]) == 1
    assert "events.jsonl: Is a directory" in capsys.readouterr().err


def test_known_jobs_are_the_latest_ones_each_once_and_arrays_by_task(home: Path) -> None:
    assert with_tasks() == []
    for name in ("1", "2", "1"):
        remember(home / name)
    assert [path.name for path in with_tasks()] == ["2", "1"]
    for task in ("3_10", "3_9"):
        (home / task).mkdir()
    remember(home / "3")
    assert [path.name for path in with_tasks()] == ["2", "1", "3_9", "3_10"]
    assert (home / "state" / "elastic_hpc" / "jobs").stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_written_is_no_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "state").write_text("a file")
    remember(home / "1")
    assert with_tasks() == []


def test_after_ctrl_c_the_last_state_stays_on_the_screen(home: Path) -> None:
    folder = records.copy("grown", home)
    (folder / "verdict.json").unlink()
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "elastic_hpc", "status", "--watch", str(folder)]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(its)
        text = b""
        while b"record" not in text:
            text += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the process has ended
            while True:
                text += os.read(ours, 65536)
        os.close(ours)
    assert b"UNKNOWN" in text.rpartition(b"\x1b[?1049l")[2]


def test_watch_ends_with_the_job_and_without_a_terminal_shows_only_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", str(records.FOLDER / "faults")]) == 0
    assert "COMPLETED" in capsys.readouterr().out
    assert main(["status", "--watch", "--json"]) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.25, "4.2 s"), (59.6, "60 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (277200, "3 d 5 h")],
)
def test_durations_are_readable_for_humans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_no_width_of_a_terminal_breaks_the_screen() -> None:
    views = [view(seen(), records.story(name), time.time()) for name in records.NAMES]
    for width in (10, 40, 80, 200):
        text = shown(table(views, width), width)
        assert len(max(text.splitlines(), key=len)) <= width
        assert "…" not in text or width < 40, "what has no room is left out, nothing is cut"
        shown(card(views[0]), width)
    assert as_json(views, 1.0, "")["time"] == 1.0


def test_status_imports_no_torch() -> None:
    code = "import sys; from elastic_hpc.cli.hpc import main; main(['status']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "REQUEUED", "RUNNING", "COMPLETING", "STAGE_OUT"])
def test_a_job_counts_as_ended_only_in_a_final_state_of_slurm(state: str) -> None:
    one = view(seen(queued=Queued(state, None, "None")), records.story("faults"), time.time())
    assert not one.over
    assert view(ended(), records.story("faults"), time.time()).over
    assert view(seen(queued=None), running(), time.time()).over, "Slurm forgets only what has ended"
    assert not view(seen(queued=None, problem="timed out"), running(), time.time()).over, "that is not known"


def batch(**changes: str) -> slurm.SlurmJob:
    unset: dict[str, Any] = {field.name: "" for field in fields(slurm.SlurmJob)}
    said = {"state": "FAILED", "reason": "JobLaunchFailure", "exit_code": "0:53", "batch_host": "n1"}
    return slurm.SlurmJob(**{**unset, **said, "output": "/home/logs/7.out", **changes})


@pytest.mark.parametrize(
    ("state", "said", "lacks", "note", "advice"),
    [
        (
            "FAILED",
            batch(),
            "/home/logs",
            "its batch script never ran: the folder of its output does not exist: /home/logs (Slurm: ",
            "make it, then submit again: mkdir -p /home/logs",
        ),
        (
            "FAILED",
            batch(),
            "",
            "its batch script never ran: n1 could not start it (Slurm: JobLaunchFailure, exit code 0:53)",
            "submit the job again with --exclude n1, and report that node to your administrator",
        ),
        (
            "FAILED",
            batch(reason="NonZeroExitCode", exit_code="7:0"),
            "",
            "it ended before an agent led it (Slurm: NonZeroExitCode, exit code 7:0)",
            "see what its batch script wrote: /home/logs/7.out",
        ),
        ("CANCELLED", batch(reason="Priority", batch_host=""), "", "it was cancelled while it waited in the queue", ""),
        ("DEADLINE", batch(reason="DeadLine", batch_host=""), "", "it ended while it waited in the queue", ""),
        ("FAILED", None, "", "it ended before an agent led it", "scontrol show job 4711"),
    ],
)
def test_a_job_whose_batch_script_never_ran_shows_why_and_what_to_do(
    state: str, said: slurm.SlurmJob | None, lacks: str, note: str, advice: str
) -> None:
    known = Queued(state, None, "None")
    one = view(seen(queued=known, ended=said, missing_folder=lacks, script="", silent=None), Story(), time.time())
    assert (one.state, one.over) == (state, True)
    assert note in one.note
    assert one.reason == one.note
    assert advice in " ".join(one.advice)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("JobHeldUser", "scontrol release 4711"),
        ("JobHeldAdmin", "ask your administrator, or scontrol release 4711"),
        ("launch failed requeued held", "scontrol release 4711"),
        ("DependencyNeverSatisfied", "it will never start: elastic-hpc stop 4711"),
        ("Resources", ""),
    ],
)
def test_a_job_that_cannot_start_on_its_own_shows_what_to_do(reason: str, advice: str) -> None:
    one = view(seen(queued=Queued("PENDING", None, reason), script="", silent=None), Story(), time.time())
    assert (one.over, one.note) == (False, reason)
    assert advice in " ".join(one.advice)
    assert bool(advice) == bool(one.advice)


def test_an_id_with_two_folders_is_refused_with_a_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        remember(RunDir(home / folder / "local.0").create().path)
    (home / "link").symlink_to("a")
    remember(home / "link" / "local.0")
    remember(home / "gone" / "local.0")
    for command in ("status", "stop", "drain", "logs", "why", "metrics", "timeline"):
        assert main([command, "local.0"]) == 2
        told = capsys.readouterr().err
        assert "elastic-hpc: local.0 is the ID of 2 jobs; give the run directory of the one you mean:\n" in told
        assert told.count("/local.0") == 2
    assert main(["status", "a/local.0"]) in {0, 1}
    assert main(["status", "x" * 300]) == 2


def test_a_slow_node_is_named_in_status_why_and_metrics() -> None:
    at, reason = 1000.0, "slow node: 63 ms in a step before its collectives, 2.1 times the 30 ms of the others"
    world = {"round": 1, "nodes": ["n1", "n2", "n3"], "world_size": 3, "restarts": 0, "leader": "n1"}
    slow = {"round": 1, "node": "n2", "seconds": 0.063, "others": 0.03, "times": 2.1, "reason": reason}
    events: list[dict[str, Any]] = [
        {"time": at, "event": "start", "run": 0, "job": "1", "granted": 3},
        {"time": at, "event": "round", **world},
        {"time": at + 9, "event": "slow", **slow},
    ]

    def metrics(one: JobView, story: Story) -> dict[str, float]:
        families = JobMetrics(lambda: ([(one, story)], True)).collect()
        found = [sample for family in families for sample in family.samples]
        return {each.labels["node"]: each.value for each in found if each.name == "elastic_hpc_slow_node_ratio"}

    story = story_of(events)
    one = view(seen(), story, at + 20)
    assert "slow      n2: 2.1 times as long as the others" in shown(card(one))
    assert metrics(one, story) == {"n2": 2.1}
    why = " ".join(shown(page(one, story, events)).split())
    assert f"n2: {reason}" in why
    assert f"* report to your administrator: n2: {reason}" in why
    story = story_of([*events, {"time": at + 30, "event": "slow_over", "round": 1, "node": "n2"}])
    one = view(seen(), story, at + 40)
    assert "slow" not in shown(card(one))
    assert "report to your administrator" not in shown(page(one, story, events))
    assert metrics(one, story) == {}
