"""examples/train_digits.py and live_digits.py, the models for users' scripts, under the launchers that they name."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from on_demand import ON_DEMAND
from torch_214 import IN_PLACE, TORCH_214

ROOT = Path(__file__).parents[2]
EXAMPLE, LIVE = (ROOT / "examples" / name for name in ("train_digits.py", "live_digits.py"))
ACCELERATE = ROOT / "examples" / "live_accelerate.py"
SRUN = [sys.executable, str(ROOT / "bin" / "elastic-srun")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
DEADLINE_S = 120.0


def into(folder: Path, example: Path = EXAMPLE) -> list[str]:
    """The example, with the option to record its steps in ``folder``."""
    where = ["--checkpoint", str(folder / "checkpoint.pt")] if example == EXAMPLE else ["--folder", str(folder)]
    return [str(example), *where]


def train(launcher: Sequence[str], folder: Path, *arguments: str, example: Path = EXAMPLE) -> str:
    """Run the example to its end. Returns its output."""
    command = [*launcher, *into(folder, example), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def accuracy(output: str) -> float:
    found = re.search(r"accuracy ([\d.]+)", output)
    assert found, output
    return float(found[1])


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRON) as process:
        try:
            yield process
        finally:
            process.terminate()  # the first signal stops elastic-srun's agents, the second one kills them
            process.terminate()


def worker(rank: int, folder: Path) -> int:
    """Pid of the worker that was started with ``rank`` and records in ``folder``."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"RANK={rank}".encode() in environ and bytes(folder) in command:
                return int(entry.name)
    raise AssertionError(f"no worker with rank {rank}")


def train_with_a_kill(command: Sequence[str], folder: Path) -> str:
    """Run ``command``, which records in ``folder``, and kill its second worker after 25 steps. Returns the output."""
    with running(command) as process:
        deadline = time.monotonic() + DEADLINE_S
        while len(steps(folder)) < 25:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(worker(1, folder), signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def test_training_continues_from_the_last_checkpoint_when_a_worker_is_killed(tmp_path: Path) -> None:
    options = ["--local", "2", "--log-dir", str(tmp_path / "logs")]
    output = train_with_a_kill([*SRUN, *options, *into(tmp_path), "--epochs", "8", "--checkpoint-every", "7"], tmp_path)

    before, after = (list(world) for _, world in groupby(steps(tmp_path), key=lambda step: step["round"]))
    assert before[0]["step"] == 1
    resumed = after[0]["step"] - 1
    assert resumed % 7 == 0
    assert before[-1]["step"] - 7 <= resumed <= before[-1]["step"]
    assert after[-1]["step"] == 8 * 15
    assert all(b["step"] == a["step"] + 1 for world in (before, after) for a, b in pairwise(world))
    assert {step["world_size"] for step in before + after} == {2}
    assert [{step["restart"] for step in world} for world in (before, after)] == [{0}, {1}]
    assert accuracy(output) >= 0.95


def test_a_run_that_changes_its_world_size_trains_like_a_run_that_does_not(tmp_path: Path) -> None:
    changing, steady = tmp_path / "changing", tmp_path / "steady"
    torchrun = [*TORCHRUN, "--standalone", "--log-dir", str(tmp_path / "torchrun"), "--nproc-per-node", "2"]
    train(torchrun, changing, "--epochs", "1")
    train([*SRUN, "--local", "3", "--log-dir", str(tmp_path / "logs")], changing, "--epochs", "2")
    train([sys.executable], changing, "--epochs", "3")
    train([sys.executable], steady, "--epochs", "3")

    assert [step["step"] for step in steps(changing)] == list(range(1, 3 * 15 + 1))
    assert [step["world_size"] for step in steps(changing)] == [2] * 15 + [3] * 15 + [1] * 15
    for one, other in zip(steps(changing), steps(steady), strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=0.05), (one, other)


@IN_PLACE
@pytest.mark.parametrize("example", [LIVE, ACCELERATE], ids=lambda path: path.name)
def test_in_place_a_killed_worker_costs_the_others_neither_their_processes_nor_a_step(
    example: Path, tmp_path: Path
) -> None:
    launcher = [TORCH_214, *SRUN[1:], "--local", "3", "--log-dir", str(tmp_path / "logs")]
    length = ["--epochs", "8"] if example == LIVE else ["--steps", "120"]
    output = train_with_a_kill([*launcher, *into(tmp_path, example), *length], tmp_path)

    done = steps(tmp_path)
    worlds = [list(world) for _, world in groupby(done, key=lambda step: step["round"])]
    assert all(b["step"] == a["step"] + 1 for world in worlds for a, b in pairwise(world))
    # another rank may have completed the killed worker's step, and given its state to rank 0
    assert all(after[0]["step"] - before[-1]["step"] in {1, 2} for before, after in pairwise(worlds))
    assert (done[0]["step"], done[-1]["step"]) == (1, 120)
    assert len({step["pid"] for step in done}) == 1
    # the new worker joins when it is ready, which may be after the end
    assert [world[0]["world_size"] for world in worlds] in ([3, 2], [3, 2, 3])
    assert accuracy(output) >= 0.95


@ON_DEMAND
def test_without_support_for_training_in_place_the_script_restarts_and_trains_like_the_other(tmp_path: Path) -> None:
    changing, steady = tmp_path / "changing", tmp_path / "steady"
    torchrun = [*TORCHRUN, "--standalone", "--log-dir", str(tmp_path / "torchrun"), "--nproc-per-node", "2"]
    train(torchrun, changing, "--epochs", "1", example=LIVE)
    train([*SRUN, "--local", "3", "--log-dir", str(tmp_path / "logs")], changing, "--epochs", "2", example=LIVE)
    train([sys.executable], changing, "--epochs", "3", example=LIVE)
    train([sys.executable], steady, "--epochs", "3")

    assert [step["step"] for step in steps(changing)] == list(range(1, 3 * 15 + 1))
    assert [step["world_size"] for step in steps(changing)] == [2] * 15 + [3] * 15 + [1] * 15
    for one, other in zip(steps(changing), steps(steady), strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=0.05), (one, other)


@pytest.mark.parametrize("example", [EXAMPLE, LIVE], ids=lambda path: path.name)
def test_the_example_is_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 100
