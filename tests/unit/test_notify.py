"""``--notify``: the content and recipients of notifications; a failed notification harms nothing."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from elastic_hpc import JobSpec, UsageError, render
from elastic_hpc.agent import notify
from elastic_hpc.environment import NOTIFY
from elastic_hpc.membership.standstill import Reached, Standstill
from elastic_hpc.options.values import is_web_address
from elastic_hpc.options.values import notify as notify_option
from elastic_hpc.record.rundir import RunDir

FAILED = {"outcome": "failed", "reason": "used up", "failure": {"traceback": "Traceback\nValueError: no\n"}}


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "17").create()
    made.write("spec.json", {"script": "/home/train.py"})
    return made


def test_a_command_gets_the_cause_and_the_first_traceback(rundir: RunDir) -> None:
    to = rundir.path / "told"
    command = f"sh -c 'cat > {to}; echo $ELASTIC_HPC_NOTICE_EVENT >> {to}'"
    assert notify.send(notify.of_verdict(rundir, FAILED), {**os.environ, NOTIFY: command}) == ""
    assert to.read_text() == "job 17 (train.py) has failed: used up\n```\nTraceback\nValueError: no\n```\nfailed\n"


def test_a_webhook_gets_json_in_the_format_of_slack_and_others(rundir: RunDir) -> None:
    got: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(404 if self.path == "/no" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert notify.send(notify.of_verdict(rundir, {**FAILED, "outcome": "requeue"}), {NOTIFY: f"{url}/secret"}) == ""
        assert "answered 404" in notify.send(notify.of_standstill(rundir, "why"), {NOTIFY: f"{url}/no"})
        server.shutdown()
    body = json.loads(got[0])
    assert body["text"].startswith("job 17 (train.py) returns to the queue: used up\n")
    assert (body["event"], body["job"], body["run_dir"]) == ("requeue", "17", str(rundir.path))


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("false", "false: exit code 1"),
        ("/nowhere/tell secret", "tell: No such file or directory"),
        ("sh -c 'exit 3' secret", "sh: exit code 3"),
        ("http://127.0.0.1:9/T0/secret", "the web address cannot be reached from this node"),
        ("sh -c 'sleep 60; :'", "in 0.5 s"),
    ],
)
def test_a_failed_notification_is_only_reported_and_without_the_secret(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch, target: str, problem: str
) -> None:
    if "sleep" in target:
        monkeypatch.setattr(notify, "_SECONDS", 0.5)
    told = notify.send(notify.of_standstill(rundir, "why"), {**os.environ, NOTIFY: target})
    assert problem in told
    assert "secret" not in told


def test_no_notification_is_sent_unless_the_user_requests_it(rundir: RunDir) -> None:
    assert notify.send(notify.of_verdict(rundir, FAILED), {}) == ""


def test_the_web_address_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("pass\n")
    script = render(JobSpec.of("train.py", nodes=2, notify="https://hooks.example.org/T0/secret", notify_after=60))
    assert "export ELASTIC_HPC_NOTIFY=https://hooks.example.org/T0/secret" in script
    assert "export ELASTIC_HPC_NOTIFY_AFTER=60" in script
    assert "secret" not in script.partition("\nsrun ")[2].partition("# elastic-sbatch --resume")[0]


@pytest.mark.parametrize(
    "given",
    [
        "mail 'me",
        "",
        "https:/hooks/T0",
        "httpp://x/y",
        "FTP://x/y",
        "http://",
        "https:///T0",
        "http://x y",
        "TOKEN=a curl x",
        "'https://x/T0' y",
    ],
)
def test_what_is_neither_a_command_nor_a_web_address_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match=r"expected a command, for example .* or a web address that begins with"):
        notify_option(given)


def test_a_web_address_in_capitals_is_no_command() -> None:
    assert notify_option("HTTPS://hooks.example.org/T0") == "HTTPS://hooks.example.org/T0"
    assert is_web_address("HTTPS://hooks.example.org/T0")


def at(step: int | None, nodes: int = 2) -> Reached:
    return Reached(1, nodes, 2 * nodes, 0, step)


def test_a_standstill_is_noticed_once_and_again_after_progress() -> None:
    watch = Standstill(60)
    assert not watch.look(at(5), 0)
    assert not watch.look(at(5), 59)
    assert (
        watch.look(at(5), 60) == "no step after step 5 for 60 s; now: step 5, 2 nodes, 4 workers, round 1, 0 restarts"
    )
    assert not watch.look(at(5), 100)
    assert not watch.look(at(6), 110)
    assert watch.look(at(6), 170)


def test_repeated_steps_and_a_world_that_does_not_form_are_no_progress() -> None:
    watch = Standstill(60)
    watch.look(at(50), 0)
    assert not watch.look(at(40), 30)
    assert watch.look(at(None, nodes=0), 61).startswith("no step after step 50 for 60 s; now: no world")
    assert not Standstill(60).look(at(None, nodes=0), 61)


def test_for_a_script_that_reports_no_steps_no_standstill_is_reported() -> None:
    watch = Standstill(60)
    assert not any(watch.look(at(None), now) for now in range(0, 1000, 20))
