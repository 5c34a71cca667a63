"""The records of real jobs in tests/records, and damaged copies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from elastic_hpc.record.events import EventReader
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.story import Story
from elastic_hpc.view.story_builder import story_of

FOLDER = Path(__file__).parents[1] / "records"
NAMES = ("faults", "head", "grown", "broken", "cancelled")


def events(name: str) -> list[dict[str, Any]]:
    return RunDir(FOLDER / name).events()


def story(name: str) -> Story:
    return story_of(events(name))


def story_in(folder: Path) -> Story:
    reader = EventReader(folder)
    reader.read()
    return story_of(reader.events, reader.damaged)


def copy(name: str, to: Path) -> Path:
    return shutil.copytree(FOLDER / name, to / name)


def write(folder: Path, events: list[dict[str, Any]]) -> None:
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``folder`` as the home and working directory of a user who knows no job; there are no Slurm commands."""
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(folder)
    return folder
