"""A job from Python: the content of its run directory, and its requests to Slurm."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from elastic_hpc import ElasticError, Job, JobFailed, JobSpec, SlurmError, UsageError, render, submit
from elastic_hpc.cli.hpc import main
from elastic_hpc.job import lookup
from elastic_hpc.record.events import append_event
from elastic_hpc.record.registry import remember
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import label

FINISHED = {"outcome": "finished", "cause": "", "reason": "all workers finished", "failure": None, "run": 0}
FAILED = {**FINISHED, "outcome": "failed", "cause": "budget", "reason": "used up", "failure": {"rank": 1}}
REQUEUED = {**FINISHED, "outcome": "requeue", "cause": "time limit", "reason": "time limit"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job that has run, with commands of a Slurm that knows no job; they run the shell code in the file ``slurm``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("squeue", "scancel", "sbatch", "scontrol"):
        (programs / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/asked\n. {tmp_path}/slurm\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    rundir = RunDir(tmp_path / "elastic-logs" / "17").create()
    rundir.make_secret()
    append_event(rundir.path, "n1", 1.0, "start", {"run": 0, "job": "17", "granted": 2})
    world = {"round": 2, "nodes": ["n1", "n3"], "world_size": 4, "restarts": 1, "leader": "n1"}
    append_event(rundir.path, "n1", 1.0, "round", world)
    says(tmp_path, "echo squeue: error: Invalid job id specified >&2; exit 1")
    return Job(rundir.path)


def says(folder: Path, answer: str) -> None:
    (folder / "slurm").write_text(answer)


def record(job: Job, verdict: dict[str, object]) -> RunDir:
    rundir = RunDir(job.run_dir)
    append_event(rundir.path, "n1", 2.0, "verdict", {**verdict, "restarts": 1, "requeues": 3})
    rundir.write("verdict.json", verdict)
    return rundir


@pytest.mark.parametrize(
    ("verdict", "state"),
    [(FINISHED, "COMPLETED"), (FAILED, "FAILED"), ({**FAILED, "cause": "user"}, "CANCELLED")],
)
def test_an_ended_job_is_known_even_if_slurm_has_forgotten_it(job: Job, verdict: dict, state: str) -> None:
    record(job, verdict)
    status = job.wait(timeout=5)
    assert (status.state, status.done, status.reason) == (state, True, verdict["reason"])
    assert (status.round, status.nodes, status.world_size) == (2, ("n1", "n3"), 4)
    assert (status.restarts, status.requeues, status.failure) == (1, 3, verdict["failure"])
    assert not Path("asked").exists()


def test_a_job_without_a_verdict_that_slurm_does_not_know_has_ended(job: Job) -> None:
    status = job.wait(timeout=5)
    assert (status.state, status.done) == ("UNKNOWN", True)


def test_a_job_does_not_count_as_ended_if_slurm_does_not_answer(job: Job, tmp_path: Path) -> None:
    says(tmp_path, "echo squeue: error: Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(SlurmError, match="Unable to contact"):
        job.status()
    with pytest.raises(TimeoutError, match="job 17 has not ended in 1 s; the job continues"):
        job.wait(timeout=1)


def test_a_job_that_has_not_started_is_cancelled_in_the_queue(job: Job, tmp_path: Path) -> None:
    says(tmp_path, "echo '23|PENDING|N/A|N/A|Resources'")
    assert Job(tmp_path / "elastic-logs" / "23").stop() == "cancelled"
    assert Path("asked").read_text().splitlines()[-1] == f"{tmp_path}/bin/scancel 23"


def test_waiting_continues_through_a_requeue(job: Job, tmp_path: Path) -> None:
    record(job, REQUEUED).mark_acted(0, "17")
    says(tmp_path, "echo '17|PENDING|N/A|N/A|None'")
    assert (job.status().state, job.status().done) == ("PENDING", False)
    with pytest.raises(TimeoutError):
        job.wait(timeout=1)
    assert job.stop() == "cancelled"
    assert Path("asked").read_text().splitlines()[-1].endswith("scancel 17")


def test_a_job_that_another_job_continues_is_that_job_from_then_on(job: Job, tmp_path: Path) -> None:
    record(job, REQUEUED)
    says(
        tmp_path, f"echo '17|COMPLETED|N/A|N/A|None'; echo '18|RUNNING|N/A|N/A|None'; printf 18 > {job.run_dir}/acted.0"
    )  # while Slurm answers
    status = job.status()
    assert (status.state, status.done, job.slurm_id) == ("RUNNING", False, "18")


def test_logs_have_the_output_of_one_rank_round_after_round(job: Job) -> None:
    for round in ("0.1", "0.10", "0.9", "1.11"):
        for rank in (1, 10):
            path = job.run_dir / "logs" / round / f"n1.rank{rank}.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(label(rank, "out", 1.0) + f"{round} {rank}\n".encode())
    assert list(job.logs(rank=1)) == ["0.1 1\n", "0.9 1\n", "0.10 1\n", "1.11 1\n"]
    assert list(job.logs(rank=1, stream="err")) == []


def test_a_job_is_the_same_from_python_as_from_the_command_line(job: Job, tmp_path: Path) -> None:
    Path("train.py").write_text("pass\n")
    Path("elastic_hpc.toml").write_text("[sbatch]\npartition = 'gpu'\n")
    spec = JobSpec.of(
        "train.py", "--lr", "1e-3", nodes="4:8", grow=True, free_growth=False, preflight=None, exclusive=True, time=60
    )
    text = render(spec)
    for line in ("--nodes=4-8", "--partition=gpu", "--exclusive", "--time=60"):
        assert f"#SBATCH {line}" in text
    assert "-- train.py --lr 1e-3" in text.replace("\\\n  ", "")
    assert "--grow on" in text.replace("\\\n  ", "")
    says(tmp_path, "cat > script; echo 19")
    submitted = submit(spec)
    assert (submitted.id, submitted.run_dir) == ("19", tmp_path / "elastic-logs" / "19")
    assert Path("script").read_text() == text


def test_an_array_has_tasks_and_no_state_of_its_own(job: Job, tmp_path: Path) -> None:
    Path("train.py").write_text("pass\n")
    says(tmp_path, "echo 20")
    array = submit(JobSpec.of("train.py", nodes=2, array="0-3"))
    assert array.task(3).run_dir.name == "20_3"
    with pytest.raises(UsageError, match=r"expected one of its tasks, for example job.task\(0\)"):
        array.status()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "nodes: missing, for example nodes='2:4'"),
        ({"nodes": 2, "ntasks": 4}, "--ntasks=4: with a task count Slurm grants only MIN nodes"),
        ({"nodes": 2, "wait": True}, "wait: belongs on sbatch's command line"),
        ({"nodes": 2, "grow": 7}, "--grow '7': expected on or off"),
    ],
)
def test_options_that_the_command_refuses_are_refused_from_python(job: Job, options: dict, complaint: str) -> None:
    Path("train.py").write_text("pass\n")
    with pytest.raises(UsageError) as refused:
        JobSpec.of("train.py", **options)
    assert complaint in str(refused.value)


def test_waiting_polls_slurm_less_and_less_often(job: Job, tmp_path: Path) -> None:
    says(tmp_path, "echo '17|RUNNING|N/A|N/A|None'")
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        job.wait(timeout=4)
    assert len(Path("asked").read_text().splitlines()) <= 1 + (time.monotonic() - begin) // 2


def by_command(job: Job, capsys: pytest.CaptureFixture[str]) -> dict:
    main(["status", "--json", str(job.run_dir)])
    return json.loads(capsys.readouterr().out)["jobs"][0]


def knows(*rows: str) -> str:
    return "; ".join(f"echo '{row}|N/A|N/A|None'" for row in rows)


@pytest.mark.parametrize(
    ("verdict", "slurm", "state"),
    [
        (FINISHED, "exit 1", "COMPLETED over"),
        ({**FAILED, "cause": "user"}, "exit 1", "CANCELLED over"),
        (REQUEUED, knows("17|PENDING"), "PENDING"),
        (REQUEUED, knows("17|CANCELLED"), "CANCELLED over"),
        (REQUEUED, "echo squeue: error: Invalid job id specified >&2; exit 1", "UNKNOWN over"),
        (None, "echo squeue: error: Invalid job id specified >&2; exit 1", "UNKNOWN over"),
        (None, knows("17|TIMEOUT"), "TIMEOUT over"),
        (None, knows("17|CONFIGURING"), "CONFIGURING"),
        ("{", knows("17|RUNNING"), "RUNNING"),  # a damaged verdict
        (REQUEUED, knows("17|COMPLETED", "18|RUNNING") + "; printf 18 > elastic-logs/17/acted.0", "RUNNING"),
        ("led again", knows("17|RUNNING"), "RUNNING"),  # a user has requeued the job after its end
        ("array", knows("20_0|PENDING", "20_1|PENDING"), "PENDING"),
    ],
)
def test_a_job_is_the_same_in_python_and_on_the_screens(
    job: Job,
    verdict: dict | str | None,
    slurm: str,
    state: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if verdict == "array":
        remember(tmp_path / "elastic-logs" / "20")
        job = Job(20)
    elif verdict == "led again":
        record(job, FINISHED).write("endpoint.json", {"run": 1})
    elif verdict == "{":
        (job.run_dir / "verdict.json").write_text("{")
    elif verdict:
        record(job, verdict)  # type: ignore[arg-type]
    says(tmp_path, slurm)
    shown = by_command(job, capsys)
    (job.run_dir / "acted.0").unlink(missing_ok=True)
    status = job.status()
    assert (status.state, status.done) == (shown["state"], shown["over"])
    assert status.state + " over" * status.done == state
    for name in ("round", "world_size", "restarts", "requeues", "reason", "failure"):
        assert getattr(status, name) == shown[name]


def test_a_job_is_found_by_id_as_by_the_commands(job: Job, tmp_path: Path) -> None:
    assert Job(17) == Job("17") == Job("elastic-logs/17") == Job(job.run_dir)
    assert Job(np.int64(17)) == Job("17\n") == Job("elastic-logs/../elastic-logs/17") == job
    assert {Job(17), Job("elastic-logs/17")} == {job}
    for other_kind in (None, 17.0, b"17", ["17"]):
        with pytest.raises(UsageError, match="expected its job ID, or its run directory"):
            Job(other_kind)  # type: ignore[arg-type]
    assert Job("elastic-logs/23").run_dir == tmp_path / "elastic-logs" / "23"
    assert job != "17"
    with pytest.raises(UsageError, match="'23': expected the ID of a job that was submitted from here"):
        Job(23)
    other = tmp_path / "other" / "17"
    other.mkdir(parents=True)
    remember(other)
    with pytest.raises(UsageError, match="17 is the ID of 2 jobs") as refused:
        Job(17)
    assert f"  {job.run_dir}\n  {other}" in str(refused.value)


def test_waiting_raises_for_a_job_that_has_not_completed_if_requested(job: Job) -> None:
    record(job, {**FAILED, "failure": {"rank": 1, "traceback": "ValueError: bad sample"}})
    told = "job 17 has not completed, it is FAILED: used up\nValueError: bad sample"
    with pytest.raises(JobFailed, match=told) as why:
        job.wait(timeout=5, check=True)
    assert why.value.status == job.wait()
    record(job, FINISHED)
    assert job.wait(timeout=5, check=True).state == "COMPLETED"


def test_a_notebook_shows_a_table_in_which_markup_is_text(job: Job) -> None:
    record(job, {**FAILED, "reason": "<script>alert(1)</script>"})
    shown = job._repr_html_()
    assert shown.startswith("<table><tr><th>job</th><td>17 ")
    assert "FAILED: &lt;script&gt;" in shown
    assert "<script" not in shown


def test_a_notebook_shows_the_same_as_status(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    record(job, FINISHED)
    assert main(["status", str(job.run_dir)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:]]
    cells = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", job._repr_html_())
    assert [name for name, _ in lines] == [name for name, _ in cells[2:]]
    assert [text.rstrip() for _, text in lines] == [html.unescape(text) for _, text in cells[2:]]
    assert cells[1] == ("state", "COMPLETED: all workers finished")


def test_why_and_events_are_the_same_as_those_of_the_commands(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    record(job, FINISHED)
    told, events = job.why(), job.events()
    assert capsys.readouterr() == ("", "")
    assert main(["why", str(job.run_dir)]) == 0
    assert capsys.readouterr().out == told
    assert [event["event"] for event in events] == ["start", "round", "verdict"]


def test_logs_of_an_unknown_stream_are_refused(job: Job) -> None:
    with pytest.raises(UsageError, match="stream 'stderr': expected 'out' or 'err'"):
        list(job.logs(stream="stderr"))  # type: ignore[arg-type]


def test_logs_follow_the_job_until_its_end(job: Job, tmp_path: Path) -> None:
    says(tmp_path, knows("17|RUNNING"))
    path = job.run_dir / "logs" / "0.2" / "n1.rank0.log"
    path.parent.mkdir(parents=True)
    full, part = label(0, "out", 1.0), label(0, "out", 1.0, full=False)
    path.write_bytes(full + b"one\n" + part + b"tw\n")
    lines = job.logs(follow=True)
    assert next(lines) == "one\n"

    def go_on() -> None:
        with path.open("ab") as file:
            file.write(full + b"o\n" + full + b"\xff\n" + part + b"last\n")
        record(job, FINISHED)

    threading.Timer(0.7, go_on).start()
    assert list(lines) == ["two\n", "\N{REPLACEMENT CHARACTER}\n", "last"]


def test_ctrl_c_ends_the_waiting_and_not_the_job(job: Job, tmp_path: Path) -> None:
    says(tmp_path, knows("17|RUNNING"))
    for wait in (job.wait, lambda: list(job.logs(follow=True))):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            wait()
    assert "scancel" not in Path("asked").read_text()


def test_a_job_that_failed_before_an_agent_led_it_shows_the_end_of_its_output(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(tmp_path / "elastic-logs" / "18").create()
    lines = [f"line {number}" for number in range(20)]
    (tmp_path / "18.out").write_text("\n".join([*lines, "job.sh: module: \x1b[1mnot found", "exit code 127", ""]))
    shown = (
        "JobId=18 JobName=x\n   UserId=me(1)\n   JobState=FAILED Reason=NonZeroExitCode\n   Restarts=0 ExitCode=127:0\n"
        f"   BatchHost=n1\n   Command=x\n   StdErr={tmp_path}/18.out\n   StdOut={tmp_path}/none.out\n"
    )
    (tmp_path / "shown").write_text(shown)
    says(tmp_path, f"case $0 in *scontrol) cat {tmp_path}/shown;; *) {knows('18|FAILED')};; esac")
    assert main(["why", "elastic-logs/18"]) == 0
    said = capsys.readouterr().out
    end = [*lines[-8:], "job.sh: module:  [1mnot found", "exit code 127"]
    assert "the last lines of its output\n  " + "\n  ".join(end) + "\n" in said
    assert main(["logs", "elastic-logs/18"]) == 1
    assert capsys.readouterr().err.endswith("\n  exit code 127\n")


def test_an_ended_job_is_not_stopped_again(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(job, FINISHED)
    assert job.stop() == "over"
    assert main(["stop", str(job.run_dir)]) == 0
    assert capsys.readouterr().out == "job 17 has ended, COMPLETED: all workers finished\n"
    assert main(["drain", str(job.run_dir)]) == 1
    assert capsys.readouterr().err == "elastic-hpc: job 17 has ended, COMPLETED: there is nothing to drain\n"
    assert not Path("asked").exists()
    assert main(["stop", "nosuchjob"]) == main(["drain", "nosuchjob"]) == 2


def test_each_of_several_jobs_is_cancelled_even_if_another_cannot_be_cancelled(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(job, FINISHED)
    for name in ("18", "19", "20_0"):
        RunDir(tmp_path / "elastic-logs" / name).create()
    running = "; ".join(knows(f"{id}|RUNNING") for id in ("18", "19"))
    refuses = "case $* in *18*) echo scancel: error: Access/permission denied >&2; exit 1;; esac"
    says(tmp_path, f"case $0 in *scancel) {refuses};; *) {running};; esac")
    assert main(["cancel", "18", "nosuchjob", "17", "19", "20", "19"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "job 17 has ended, COMPLETED: all workers finished",
        "job 19 is cancelled",
        "job 20 is cancelled",
    ]
    refusal, unknown = captured.err.splitlines()
    assert refusal == "elastic-hpc: scancel 18: Access/permission denied"
    assert unknown.startswith("elastic-hpc: 'nosuchjob': expected the ID of a job")
    asked = [line.split("/")[-1] for line in Path("asked").read_text().splitlines() if "scancel" in line]
    assert asked == ["scancel 18", "scancel 19", "scancel 20"]
    assert main(["cancel", "18", "19"]) == 1


def test_a_job_without_a_leader_is_cancelled_by_slurm_but_cannot_save(job: Job, tmp_path: Path) -> None:
    says(tmp_path, knows("17|RUNNING"))
    with pytest.raises(ElasticError, match="no leader has been started yet"):
        job.stop(after_checkpoint=True)
    with pytest.raises(ElasticError, match="no leader has been started yet"):
        job.drain()
    assert job.stop() == "cancelled"
    assert Path("asked").read_text().splitlines()[-1].endswith("scancel 17")


def test_a_waiting_job_cannot_be_drained(job: Job, tmp_path: Path) -> None:
    says(tmp_path, knows("17|PENDING"))
    with pytest.raises(ElasticError, match=r"job 17 waits in the queue \(None\): nothing runs there yet"):
        job.drain()


def test_for_a_job_that_cannot_be_resized_the_error_shows_why_and_what_to_do(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*command: str) -> str:
        assert main([command[0], str(job.run_dir), *command[1:]]) == 1
        return capsys.readouterr().err.removeprefix("elastic-hpc: ").strip()

    says(tmp_path, knows("17|PENDING"))
    assert refused("resize", "1:2") == (
        "job 17 waits in the queue and has not started yet: type elastic-hpc stop 17, then submit it with --nodes 1:2"
    )
    says(tmp_path, knows("17|SUSPENDED"))
    assert refused("resize", "1:2") == (
        "job 17 is SUSPENDED, and has no agent that could answer: try again when the job runs"
    )
    says(tmp_path, knows("17|PENDING"))
    RunDir(job.run_dir).write("spec.json", {"--world-multiple-of": "2"})
    assert main(["resize", str(job.run_dir), "3:2"]) == 2
    assert "'3:2': expected N or MIN:MAX with 1 <= MIN <= MAX, for example 4:8" in capsys.readouterr().err
    assert main(["resize", str(job.run_dir), "3"]) == 2
    assert "expected a multiple of 2" in capsys.readouterr().err
    config = "echo SchedulerParameters = bf_interval=1,disable_job_shrink"
    says(tmp_path, f"case $0 in *scontrol) {config};; *) {knows('17|RUNNING')};; esac")
    forbidden = "this site does not let a job give nodes back (SchedulerParameters=disable_job_shrink)"
    assert refused("release", "n3") == f"{forbidden}: expected nodes that came by --grow: there is none"
    record(job, FINISHED)
    assert refused("resize", "2") == "job 17 has ended, COMPLETED: it has no nodes that could be resized"
    assert refused("release", "n3") == "job 17 has ended, COMPLETED: it has no nodes that could be released"


def test_a_requeued_job_that_waits_requests_the_new_number_of_nodes_and_starts_with_it(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rundir = RunDir(job.run_dir)
    rundir.write("spec.json", {"--spares": "1", "job": "17"})
    rundir.write("state.json", {"round": 2})
    says(tmp_path, knows("17|PENDING"))
    assert main(["resize", str(job.run_dir), "2,4"]) == 0
    assert capsys.readouterr().out == "job 17 may have 2,4 nodes; it waits in the queue, and now requests as many\n"
    assert Path("asked").read_text().splitlines()[-1].endswith("scontrol update JobId=17 NumNodes=2-5")
    assert rundir.read("state.json") == {"round": 2, "bounds": {"min_nodes": 2, "max_nodes": 4, "sizes": "2,4"}}
    assert (job._look().view.min_nodes, job._look().view.max_nodes) == (2, 4)


def test_an_array_is_stopped_as_a_whole_and_shown_by_its_tasks(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember(tmp_path / "elastic-logs" / "20")
    for task in ("20_0", "20_1"):
        RunDir(tmp_path / "elastic-logs" / task).create().write("verdict.json", FINISHED)
    assert main(["status", "20", "--json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["jobs"]] == ["20_0", "20_1"]
    assert Job("20_7").run_dir == tmp_path / "elastic-logs" / "20_7"
    for command in ("why", "logs", "timeline --html -"):
        name, *more = command.split()
        assert main([name, "20", *more]) == 2
        assert f"job 20 is an array; expected one of its tasks: elastic-hpc {name} 20_0" in capsys.readouterr().err
    with pytest.raises(UsageError, match="job 20 is an array"):
        Job(20).status()
    says(tmp_path, "")
    assert Job(20).stop() == "cancelled"
    assert Path("asked").read_text().splitlines() == [f"{tmp_path}/bin/scancel 20"]


def test_a_folder_name_that_is_no_slurm_id_hides_no_job(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = "case $* in *local*) echo squeue: error: Invalid job id: local.0 >&2; exit 1; esac"
    says(tmp_path, f"{refuses}; {knows('17|RUNNING')}")
    RunDir(tmp_path / "elastic-logs" / "local.0").create()
    assert main(["status", "17", "local.0", "--json"]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)["jobs"]] == ["RUNNING", "UNKNOWN"]


def test_another_kind_of_folder_is_no_job(tmp_path: Path) -> None:
    (tmp_path / "elastic-logs" / "7").mkdir(parents=True)
    assert lookup.find(f"{tmp_path}/elastic-logs/7") == tmp_path / "elastic-logs" / "7"
    for other in tmp_path / "elastic-logs", Path("/etc"):
        with pytest.raises(UsageError, match="expected the ID of a job that was submitted from here, or its run dir"):
            lookup.find(f"{other}")
