"""``elastic-hpc serve``: jobs in a browser, for users who have the address."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import records
from test_timeline import CHROMIUM, Page, screenshot

from elastic_hpc.cli import serve
from elastic_hpc.record.rundir import RunDir


@contextlib.contextmanager
def served(*jobs: Path) -> Iterator[str]:
    """The address of the page of all jobs."""
    command = [sys.executable, "-m", "elastic_hpc", "serve", *map(str, jobs)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = re.fullmatch(r"(http://127\.0\.0\.1:\d+/[\w-]{32}/)\n", process.stderr.readline())
        assert said
        assert "ssh -N -L " in process.stderr.readline()
        try:
            yield said[1]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stderr.read() == "Ctrl-C ends this\n", (
                "a request, whose path has the secret, is never logged"
            )


def get(address: str, method: str = "GET") -> tuple[int, str]:
    """The status and the page; redirects are followed."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=30) as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def link(page: str, job: str = "") -> str:
    found = re.search(rf'href="(job/\w+)">{job}', page)
    assert found
    return found[1]


def test_each_job_has_a_line_and_a_page_with_timeline_output_and_why(tmp_path: Path) -> None:
    with served(records.copy("faults", tmp_path), records.copy("broken", tmp_path)) as address:
        page = get(address)[1]
        assert len(re.findall('href="job/', page)) == 2
        assert "COMPLETED" in page
        assert "FAILED" in page
        job = get(address + link(page, "faults"))[1]
        assert "<svg" in job
        assert "charged: restart 1" in job
        assert "rank 0|" in job
        assert "<button>" not in job, "there is nothing to stop in a job that is over"
        assert not [loaded for loaded in Page(job).loads if loaded not in {"data:,", "../"}]


def test_an_ended_job_without_output_says_that_the_workers_wrote_nothing(tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    shutil.rmtree(folder / "logs")
    with served(folder) as address:
        page = get(address + link(get(address)[1]))[1]
    assert "the workers wrote nothing" in page
    assert "nothing so far" not in page


def test_the_page_shows_new_events_of_the_record(tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    events = records.events("faults")
    records.write(folder, events[:8])
    with served(folder) as address:
        job = address + link(get(address)[1])
        before = get(job)[1]
        records.write(folder, events)
        assert "charged: restart 2" not in before
        while "charged: restart 2" not in get(job)[1]:  # the time limit of the tests ends it
            pass


def test_without_the_secret_nothing_is_shown_or_done(tmp_path: Path) -> None:
    with served(records.copy("faults", tmp_path)) as address:
        root = address.rsplit("/", 2)[0]
        job = link(get(address)[1])
        for path in ("/", "/x/", f"/{job}", f"//{job}", f"/{'x' * 32}/{job}", f"/%2e%2e/{job}"):
            for method in ("GET", "POST"):
                assert get(root + path, method)[0] == 404, path
        for path in ("job/0000000000000000", "job/../../etc", f"{job}/stop", "job/", f"{job}/x"):
            assert get(address + path)[0] == 404, path
        for path in (f"{job}/unknown", job, "", f"{job}/stop/stop", "job/0000000000000000/stop"):
            assert get(address + path, "POST")[0] == 404, path


def test_the_effect_of_an_action_is_shown(tmp_path: Path) -> None:
    with served(records.copy("faults", tmp_path)) as address:
        job = address + link(get(address)[1])
        status, page = get(f"{job}/stop", "POST")
        assert status == 200
        assert "the job had already ended" in page
        assert "there is nothing to drain" in get(f"{job}/drain", "POST")[1]


def test_an_address_without_its_last_slash_leads_to_the_page(tmp_path: Path) -> None:
    with served(records.copy("faults", tmp_path)) as address:
        assert link(get(address.rstrip("/"))[1])


def test_a_job_whose_record_cannot_be_read_shows_the_problem_in_its_line(tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    with served(folder, records.copy("broken", tmp_path)) as address:
        status, page = get(address)
        assert status == 200
        assert "events.jsonl: Is a directory" in page
        for path in re.findall(r'href="(job/\w+)"', page):
            assert get(address + path)[0] == 200


def test_jobs_can_be_stopped_while_slurm_does_not_answer(tmp_path: Path) -> None:
    """A page is open whose query of the jobs waits for Slurm."""
    pages = serve._Pages([RunDir(records.copy("faults", tmp_path))])
    assert "COMPLETED" in pages.jobs("x")
    (key,) = pages._looks or {}
    done: list[object] = []
    with pages._looking:
        for call in (lambda: pages.act(key, "drain"), lambda: pages.jobs("x"), lambda: pages.job(key, "x")):
            thread = threading.Thread(target=lambda call=call: done.append(call()), daemon=True)
            thread.start()
            thread.join(30)
        assert len(done) == 3
    assert "there is nothing to drain" in str(done[2])


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; as root, make test installs it")
@pytest.mark.parametrize("which", ["jobs", "job"])
def test_a_browser_shows_the_page_without_errors(which: str, tmp_path: Path) -> None:
    with served(records.copy("faults", tmp_path), records.copy("broken", tmp_path)) as address:
        shown = address if which == "jobs" else address + link(get(address)[1], "faults")
        screen = screenshot(shown, f"serve-{which}", tmp_path, "--virtual-time-budget=6000", height=1800)
    assert screen.stat().st_size > 10_000


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; as root, make test installs it")
def test_an_update_leaves_the_focus_and_what_is_open_where_they_are(tmp_path: Path) -> None:
    """The button of an action has the focus, which the title of the page shows, while rounds are added."""
    folder = records.copy("faults", tmp_path)
    (folder / "verdict.json").unlink()
    watch = (
        "<script>const button = document.querySelector('details button'); button.closest('details').open = true;"
        "button.focus(); setInterval(() => { document.title = document.activeElement === button ? 'kept' : ''; }, 9)"
        "</script></body>"
    )
    pages = []
    for count in (8, len(records.events("faults"))):
        records.write(folder, records.events("faults")[:count])
        site = serve._Pages([RunDir(folder)])
        site.jobs("x")
        (key,) = site._looks or {}
        pages.append((site.job(key, "x") or "").replace("</body>", watch if not pages else "</body>"))
    with socket.create_server(("127.0.0.1", 0)) as port:
        asked: list[bytes] = []

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with port.accept()[0] as browser:
                        asked.append(browser.recv(65536))
                        browser.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + pages[len(asked) > 1].encode())

        threading.Thread(target=answer, daemon=True).start()
        page = dom_after(10, f"http://127.0.0.1:{port.getsockname()[1]}/", tmp_path)
    assert len(asked) > 1
    assert "<title>kept" in page
    assert '<details id="drain" open="">' in page
    assert "charged: restart 2" in page
    assert page.count('<tr id="round-') == 4


def dom_after(seconds: int, address: str, folder: Path) -> str:
    """The page at ``address`` after so many seconds of the browser's clock. ``folder``: for the browser's profile."""
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={1000 * seconds}"),
            *("--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; as root, make test installs it")
def test_a_page_shows_that_the_server_has_ended_and_polls_less_and_less_often(tmp_path: Path) -> None:
    """The browser's clock runs for ten minutes, faster than real time."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        asked: list[bytes] = []

        def answer() -> None:
            """Serves the page once and then nothing, like a server that has ended."""
            site = serve._Pages([RunDir(records.copy("faults", tmp_path))])
            with contextlib.suppress(OSError):
                while True:
                    with port.accept()[0] as browser:
                        asked.append(browser.recv(65536))
                        if len(asked) == 1:
                            browser.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + site.jobs("x").encode())

        threading.Thread(target=answer, daemon=True).start()
        page = dom_after(600, f"http://127.0.0.1:{port.getsockname()[1]}/", tmp_path)
    assert 3 <= len(asked) < 50
    assert "COMPLETED" in page
    assert '<p id="lost">elastic-hpc serve has ended or does not answer' in page
