"""A repeated training command continues from the checkpoints of the first run, with any launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_hpc.network.addresses import listen_from

BIN = Path(sys.executable).parent
TRAIN = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from elastic_hpc.training import Checkpoints
if "RANK" in os.environ:
    dist.init_process_group("gloo")
checkpoints = Checkpoints("checkpoints")
step = checkpoints.load(lambda path: int((path / "step").read_text())) or 0

def save(step):
    with checkpoints.save(step) as path:
        (path / "step").write_text(str(step))

save(step + 1)
if sys.argv[1:] == ["wait"]:
    while not Path("enough").exists():
        time.sleep(0.05)
    save(step + 2)
elif os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    (tmp_path / "train.py").write_text(TRAIN)
    yield tmp_path
    (tmp_path / "enough").touch()


def run(folder: Path, *command: str) -> tuple[int, str]:
    """Exit code and output."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


BACKEND = ("--rdzv-backend=elastic-hpc", "--rdzv-id=exp1", "--rdzv-conf=node=0", "--nnodes=1", "--max-restarts=3")


@pytest.mark.parametrize(
    ("restarts", "command"),
    [
        (1, ("elastic-srun", "--standalone", "--nproc-per-node=1", "--rdzv-id=exp1", "train.py")),
        (1, ("torchrun", *BACKEND, "--rdzv-endpoint=localhost:{port}", "train.py")),
        (1, ("torchrun", "--standalone", "--max-restarts=1", "--nproc-per-node=1", "train.py")),
        (0, ("python", "train.py")),
    ],
    ids=["elastic-srun --standalone", "torchrun with our backend", "torchrun", "python"],
)
def test_the_repeated_command_continues_after_a_restart(folder, restarts, command):
    with listen_from(29800) as free:
        command = [word.format(port=free.getsockname()[1]) for word in command]
    for times in (1, 2):
        code, output = run(folder, *command)
        assert code == 0, output
        assert steps(folder)[-1] == times * (1 + restarts)
        for state in folder.glob("elastic-logs/*/state.json"):  # as after a run whose record could not be written
            state.unlink()


def test_of_two_commands_at_once_the_second_reports_the_first_which_continues(folder):
    command = ("elastic-srun", "--standalone", "--nproc-per-node=1", "--rdzv-id=exp1", "train.py", "wait")
    with (folder / "output").open("w") as output:
        first = subprocess.Popen(
            [BIN / command[0], *command[1:]], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    end = time.monotonic() + 60
    while not (folder / "checkpoints" / "step-00000001").exists():
        assert time.monotonic() < end, (folder / "output").read_text()
        assert first.poll() is None, (folder / "output").read_text()
        time.sleep(0.05)
    code, said = run(folder, *command)
    assert code == 1
    assert "checkpoints belongs to job local.0, which is alive" in said
    assert steps(folder) == [1]
    (folder / "enough").touch()
    assert first.wait(60) == 0, (folder / "output").read_text()
    assert steps(folder) == [1, 2]
