"""``elastic-hpc timeline``: the page in a real browser, and the picture alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.job.look import Jobs
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.account import account
from elastic_hpc.view.picture import _even, draw
from elastic_hpc.view.story import Story
from elastic_hpc.view.story_builder import story_of
from elastic_hpc.view.timeline import html

SCREENS = Path(__file__).parents[2] / "build" / "screens"
"""The folder for screenshots, for manual inspection."""

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page(name: str, folder: Path) -> Path:
    file = folder / f"{name}.html"
    assert main(["timeline", str(records.FOLDER / name), "--html", str(file)]) == 0
    return file


def screenshot(address: str, name: str, folder: Path, *options: str, height: int) -> Path:
    """A screenshot of the page at ``address``; fails if the browser reports an error. ``folder``: for the browser's
    profile.
    """
    SCREENS.mkdir(parents=True, exist_ok=True)
    screen = SCREENS / f"{name}.png"
    screen.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--hide-scrollbars", f"--window-size=1180,{height}", "--enable-logging=stderr", "--no-first-run"),
            *(f"--user-data-dir={folder / 'profile'}", *options, f"--screenshot={screen}", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return screen


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; as root, make test installs it")
@pytest.mark.parametrize("name", records.NAMES)
def test_a_browser_shows_the_page_without_errors(name: str, tmp_path: Path) -> None:
    screen = screenshot(page(name, tmp_path).as_uri(), f"timeline-{name}", tmp_path, height=1250)
    assert screen.stat().st_size > 40_000, "an empty page is much smaller"


class Page(HTMLParser):
    """The words of a page, the ids of what it loads, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "link", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("name", records.NAMES)
def test_the_page_loads_nothing_and_has_the_whole_story(name: str, tmp_path: Path) -> None:
    text = page(name, tmp_path).read_text()
    seen, story = Page(text), records.story(name)
    assert seen.loads == ["data:,"]
    assert "<script" not in text
    words = " ".join(seen.words)
    for one in story.rounds:
        assert one.cause in words
    goodput = account(story).goodput
    assert ("not reported" if goodput is None else f"{goodput:.0%}") in words


def test_faults_drains_and_the_end_are_marked() -> None:
    picture = draw(records.story("faults"))
    marked = re.findall(r'<g class="(\w+)"><title>end of round (\d): ([^<]*)', picture)
    assert [(kind, number) for kind, number, _ in marked] == [
        ("fault", "1"),
        ("fault", "2"),
        ("change", "3"),
        ("done", "4"),
    ]
    for label in ("rank 2 on n3", "n3 lost", "steps that were kept", "goodput"):
        assert label in picture
    assert 'class="queue"' in picture
    assert 'class="again"' in picture


def test_the_queue_is_a_strip_below_the_nodes_and_each_colour_is_in_the_legend() -> None:
    picture = draw(records.story("faults"))
    colours = re.findall(r'<rect [^>]*height="(\d+)[^>]*class="(\w+)"', picture)
    assert {height for height, kind in colours if kind == "queue"} == {"6"}
    assert "13 s in the queue" in picture
    assert "opacity" not in "".join(re.findall("<rect [^>]*>", picture)), "a colour is the same in the legend"


@pytest.mark.parametrize(
    ("low", "high", "least", "ticks"),
    [
        (0.0, 4, 1, "0 1 2 3 4"),
        (0.0, 1, 1, "0 1"),
        (0.0, 400, 1, "0 100 200 300 400"),
        (0.0, 0.31, 0, "0 0.1 0.2 0.3"),
        (0.0, 2e-5, 0, "0 5e-06 1e-05 1.5e-05 2e-05"),
        (-0.6, 0.3, 0, "-0.5 0"),
        (-2.0, -2.0, 0, "-2"),
    ],
)
def test_an_axis_has_round_numbers_of_any_size(low: float, high: float, least: float, ticks: str) -> None:
    assert " ".join(format(tick, ".3g") for tick in _even(low, high, 4, least)) == ticks


def test_a_running_job_has_no_end_on_its_page(tmp_path: Path) -> None:
    folder = records.copy("grown", tmp_path)
    (folder / "verdict.json").unlink()
    records.write(folder, [event for event in records.events("grown") if event["event"] != "verdict"])
    (look,) = Jobs([RunDir(folder)]).look()
    running = replace(look.view, state="RUNNING", over=False)
    assert "running since 2026-" in (text := html(running, look.story, time.time()))
    assert " to 2026-" not in text


def test_output_of_a_script_cannot_break_the_page(tmp_path: Path) -> None:
    folder = records.copy("faults", tmp_path)
    odd = '<script>alert("x")</script> & \x1b[31m'
    events = records.events("faults")
    for event in events:
        if event["event"] == "failure":
            event |= {"message": odd, "traceback": odd, "node": odd}
        if event["event"] in {"restart", "verdict"}:
            event["reason"] = odd
    records.write(folder, events)
    file = tmp_path / "page.html"
    assert main(["timeline", str(folder), "--html", str(file)]) == 0
    assert "<script" not in file.read_text()
    assert odd.split(" &", maxsplit=1)[0] in " ".join(Page(file.read_text()).words)


def test_a_job_of_a_month_has_a_picture_of_bounded_size() -> None:
    events = [{**records.events("faults")[0], "time": 0.0}]
    for number in range(2000):
        begin = number * 1300.0
        events.append(
            {
                "time": begin,
                "event": "round",
                "round": number + 1,
                "nodes": [f"n{i}" for i in range(512)],
                "world_size": 4096,
                "restarts": number,
                "leader": "n0",
            }
        )
        said = {"round": number + 1, "first": number * 100 + 1, "first_at": begin + 30}
        events.append(
            {"time": begin + 1200, "event": "progress", **said, "step": number * 100 + 110, "step_at": begin + 1199}
        )
        events.append(
            {"time": begin + 1210, "event": "restart", "round": number + 2, "restarts": number + 1, "reason": "n7 lost"}
        )
    picture = draw(story_of(events))
    assert len(picture) < 4_000_000
    assert picture.count('class="small faulttext"') + picture.count('class="small changetext"') < 100


def test_the_picture_of_an_empty_record_shows_that_it_is_empty() -> None:
    assert "no run is on record" in draw(Story())


def test_the_picture_can_be_written_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py")
    file = tmp_path / "job.png"
    assert main(["timeline", str(records.FOLDER / "grown"), "--png", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(file)


def test_without_the_package_for_images_the_error_shows_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["timeline", str(records.FOLDER / "grown"), "--png", str(tmp_path / "job.png")]) == 1
    assert "pip install 'elastic_hpc[png]'" in capsys.readouterr().err
    assert main(["timeline", str(records.FOLDER / "grown")]) == 2
    assert "for example --html grown.html" in capsys.readouterr().err
