"""A job on a mini-slurm, submitted by elastic-sbatch; a measurement of what happens to it, and a summary of many."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from _cluster import Cluster, wait_for
from _report import BenchmarkError, spread

from elastic_hpc.record.rundir import RunDir

T = TypeVar("T")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in ``path``, one per line, without a last line that is still being written. [] without a file."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    objects = []
    for line in lines:
        with contextlib.suppress(ValueError):  # two processes may write one file, as attempts of torchrun do
            objects.append(json.loads(line))
    return objects


def wrong_steps(steps: Sequence[dict[str, Any]], checkpoint_every: int) -> list[str]:
    """Steps at which examples/train_digits.py trained wrongly: every round must continue right after a
    checkpoint, skip or repeat no step of its own, and write nothing once a later round writes.
    """
    wrong = [] if steps and steps[0]["step"] == 1 else ["the first step is missing"]
    for before, after in pairwise(steps):
        done = after["step"] - 1
        if before["round"] == after["round"]:
            right = done == before["step"]
        else:
            right = before["round"] < after["round"] and done % checkpoint_every == 0
            right = right and before["step"] - checkpoint_every <= done <= before["step"]
        if not right:
            wrong.append(f"step {after} after {before}")
    return wrong


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement. Times in seconds."""

    rung: str
    """What happened to the job."""
    launcher: str
    outcome: str
    """stuck: the job ran, but the new world did no step within ``waited``; ended: the job left the queue after
    ``waited``; any other word: success.
    """
    waited: float
    total: float | None = None
    round: float | None = None
    """From the decision to the new round: workers stopped, world formed. Known only for ours, like ``start``."""
    start: float | None = None
    """From the round to the end of its first step: interpreter, imports, process group, checkpoint, one step."""
    busy_before: float = 0.0
    """Share of the machine that other processes used just before the job was submitted, 0 to 1."""
    load_average: float = 0.0
    """Load average of one minute at the start of the change; it includes our own workers."""
    job: str = ""

    def text(self, phases: Iterable[str], more: str = "") -> str:
        """The measurement in one line."""
        seconds = ((name, getattr(self, name)) for name in phases)
        parts = [f"{name} {hundredths(value)}" for name, value in seconds if value is not None]
        result = ", ".join(parts) or f"{self.outcome} after {self.waited:.0f} s"
        load = f"others {self.busy_before:.0%}, load {self.load_average:.1f}"
        return f"{self.rung} {self.launcher}: {result}{more}; {load}"


def hundredths(seconds: float) -> str:
    """``seconds`` with two decimals, never "-0.00"."""
    return f"{round(seconds, 2) + 0.0:.2f}"


def summary(
    runs: Sequence[Run], rungs: Iterable[str], launchers: Sequence[str], outcomes: Sequence[str], values: Iterable[str]
) -> list[dict[str, Any]]:
    """A row for each rung and launcher: the number of runs with each of ``outcomes``, and the median, minimum and
    maximum of all ``values`` over the runs with the first of ``outcomes``.
    """
    rows: list[dict[str, Any]] = []
    for rung, launcher in ((rung, launcher) for rung in rungs for launcher in launchers):
        if mine := [run for run in runs if (run.rung, run.launcher) == (rung, launcher)]:
            row: dict[str, Any] = {"rung": rung, "launcher": launcher, "runs": len(mine)}
            row |= {outcome: sum(run.outcome == outcome for run in mine) for outcome in outcomes}
            well = [run for run in mine if run.outcome == outcomes[0]]
            rows.append(row | {name: spread(getattr(run, name) for run in well) for name in values})
    return rows


class Job:
    """One job in a folder of its own, submitted by elastic-sbatch, and what it writes there."""

    def __init__(self, at: Cluster, folder: Path, steps: Path | None, *argv: str) -> None:
        """``steps``: where the script records its steps, None for the run directory. ``argv``: options, script,
        arguments.
        """
        self.at = at
        self.folder = folder
        self._steps = steps
        at.run("mkdir", "-p", str(folder))
        self.id = self.submit(*argv)

    def submit(self, *argv: str) -> str:
        """Submit the job and return its id."""
        return self.elastic_sbatch("--parsable", *argv).strip()

    def elastic_sbatch(self, *argv: str) -> str:
        """Run elastic-sbatch and return its standard output."""
        return self.at.run(str(Path(sys.executable).with_name("elastic-sbatch")), *argv, cwd=self.folder)

    @property
    def run_dir(self) -> Path:
        return self.folder / "elastic-logs" / self.id

    def steps(self) -> list[dict[str, Any]]:
        return json_lines(self._steps or self.run_dir / "steps.jsonl")

    def events(self) -> list[dict[str, Any]]:
        return RunDir(self.run_dir).events()

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("slurm-*.out")))

    def watch(self, look: Callable[[], T | None], since: float, seconds: float) -> tuple[T | None, dict[str, Any]]:
        """What ``look`` finds within ``seconds`` of ``since``, and what a ``Run`` says of that. It continues looking
        until then, unless the job leaves the queue.
        """
        load, state_looked_up, outcome, answer = os.getloadavg()[0], 0.0, "stuck", None
        while (waited := time.time() - since) < seconds and (answer := look()) is None:
            if waited - state_looked_up > 2:
                state_looked_up = waited
                if self.at.job_state(self.id) not in {"RUNNING", "COMPLETING", "PENDING", "REQUEUED"}:
                    outcome = "ended"
                    break
            time.sleep(0.05)
        return answer, {"outcome": outcome, "waited": waited, "load_average": load, "job": self.id}

    def wait_for_steps(self, look: Callable[[], T | None], seconds: float) -> T:
        """``wait_for`` the first steps; the error shows the output of the job."""
        try:
            return wait_for("the first steps", look, seconds)
        except BenchmarkError as error:
            raise BenchmarkError(f"job {self.id}: {error}\n{self.output()[-2000:]}") from None

    def clear(self, keep: Path | None) -> None:
        """End this job and all others, copy what it wrote into ``keep``, and remove its folder."""
        self.at.run("scancel", self.id, check=False)
        if keep:
            to, but = keep / f"{self.id}-{self.folder.name}", shutil.ignore_patterns("secret", "checkpoint*")
            shutil.copytree(self.folder, to, dirs_exist_ok=True, ignore=but)
        self.at.reset()
        shutil.rmtree(self.folder, ignore_errors=True)
