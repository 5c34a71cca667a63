"""examples/train_digits.py, the model for users' scripts, under the launchers it says it runs under."""

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

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_digits.py"
SRUN = [sys.executable, str(ROOT / "bin" / "elastic-srun")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
DEADLINE_S = 120.0


def train(launcher: Sequence[str], folder: Path, *arguments: str) -> str:
    """Run the example to its end with its checkpoint in ``folder``: what it printed."""
    command = [*launcher, str(EXAMPLE), "--checkpoint", str(folder / "checkpoint.pt"), *arguments]
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
            process.terminate()  # elastic-srun stops its agents, the second signal kills them
            process.terminate()


def worker(rank: int, checkpoint: Path) -> int:
    """Pid of the worker with ``rank`` that trains into ``checkpoint``."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in environ and str(checkpoint).encode() in command:
                return int(entry.name)
    raise AssertionError(f"no worker with rank {rank}")


def test_training_goes_on_from_the_last_checkpoint_when_a_worker_is_killed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    options = ["--local", "2", "--log-dir", str(tmp_path / "logs")]
    arguments = ["--checkpoint", str(checkpoint), "--epochs", "8", "--checkpoint-every", "7"]
    with running([*SRUN, *options, str(EXAMPLE), *arguments]) as process:
        deadline = time.monotonic() + DEADLINE_S
        while len(steps(tmp_path)) < 25:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(worker(1, checkpoint), signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output

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


def test_a_run_that_changes_its_world_size_trains_like_one_that_does_not(tmp_path: Path) -> None:
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


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100
