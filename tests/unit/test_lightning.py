"""``training.lightning``: a Trainer continues in place; if that is impossible, it reports why, or continues from a
file.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from torch_214 import IN_PLACE, TORCH_214

from elastic_hpc.errors import UsageError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("lightning_script.py")
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.filterwarnings("ignore")  # files of Lightning


def steps(folder: Path) -> list[list[dict[str, Any]]]:
    """The records of each process."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("steps.*.jsonl")]


@IN_PLACE
def test_a_trainer_continues_in_place_and_a_new_worker_gets_all_state_that_lightning_saves(tmp_path: Path) -> None:
    options = ["--local", "3", "--preload", "off", "--log-dir", str(tmp_path / "logs")]
    command = [TORCH_214, str(ROOT / "bin" / "elastic-srun"), *options, str(SCRIPT), str(tmp_path)]
    environ = {**ENVIRON, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # as Lightning sets it
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    processes = sorted(steps(tmp_path), key=lambda process: (process[0]["step"], process[-1]["step"]))
    killed, one, other, new = [(process[0]["step"], process[-1]["step"]) for process in processes]
    assert killed == (1, 40)
    assert one == other == (1, new[1])  # these workers have kept their processes
    assert 40 < new[0] <= new[1]
    for process in processes:
        assert [step["step"] for step in process] == list(range(process[0]["step"], process[-1]["step"] + 1))
        assert all(math.isfinite(step["loss"]) for step in process)
    by_step: dict[int, list[Any]] = {}
    for step in chain(*processes):
        by_step.setdefault(step["step"], []).append(step["has"])
    assert [number for number, has in by_step.items() if has != [has[0]] * (3 - (40 < number < new[0]))] == []


def test_a_trainer_continues_from_a_file_of_lightning_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    from lightning_script import fit

    torch = pytest.importorskip("torch")
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    wanted = fit(whole, 23)
    fit(part, 15)
    got = fit(part, 23, checkpoint=part / "step=15.ckpt")
    assert [step["step"] for step in steps(part)[0]] == list(range(1, 24))
    assert [step["has"] for step in steps(part)[0]] == [step["has"] for step in steps(whole)[0]]
    assert torch.equal(wanted.net.weight, got.net.weight)


def test_the_example_trains_without_an_agent(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "live_lightning.py"), "--folder", str(tmp_path), "--steps", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRON, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"^step 90: accuracy ([\d.]+)$", done.stdout, re.MULTILINE)
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 0.9


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"accumulate_grad_batches": 2}, "steps once a batch"),
        ({"use_distributed_sampler": True}, "batch_sampler=strategy.batches"),
    ],
)
def test_unsupported_options_of_a_trainer_in_place_are_refused(
    options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    from lightning_script import fit

    with pytest.raises(UsageError, match=why):
        fit(tmp_path, 1, **options)
