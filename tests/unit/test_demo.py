"""``make demo`` without Slurm, on a shorter training: its output, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from on_demand import ON_DEMAND
from torch_214 import IN_PLACE, TORCH_214

ROOT = Path(__file__).parents[2]
SHORTER = """
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = SourceFileLoader("demo", sys.argv.pop(1))
demo = sys.modules["demo"] = module_from_spec(spec_from_loader("demo", loader))
loader.exec_module(demo)
demo.TRAINING[1] = "8"
demo.STEPS, demo.FAULT_STEP = 8 * 15, 50
sys.exit(demo.main())
"""


def shown(python: str, tmp_path: Path, *options: str) -> str:
    """The output of the demo without Slurm."""
    command = [python, "-B", "-c", SHORTER, str(ROOT / "bin" / "demo"), "--local", *options]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.glob("elastic-hpc-demo.*"))
    return done.stdout


def pids(output: str) -> list[dict[str, str]]:
    """The pids by node, for each world."""
    lines = re.findall(r"processes of the workers: (.*)", output)
    return [dict(worker.split() for worker in line.split(", ")) for line in lines]


@IN_PLACE
def test_the_demo_shows_workers_that_keep_their_processes_and_lose_no_step(tmp_path: Path) -> None:
    output = shown(TORCH_214, tmp_path)
    before, after = pids(output)
    assert list(before) == ["local0", "local1", "local2", "local3"]
    assert after == {node: pid for node, pid in before.items() if node != "local2"}
    assert "in place: 3 of 3 workers kept their process" in output
    assert re.search(r"local2 has lost its agent: \d+\.\d\d s until the next step", output)
    assert "steps repeated: 0; processes kept: " + ", ".join(map(" ".join, after.items())) in output
    assert re.search(r"next: new round .*in place: 3 of 3", output), "elastic-hpc why"


@ON_DEMAND
@pytest.mark.parametrize("option", [["--restart"], []], ids=["restart", "old torch"])
def test_the_demo_shows_a_restart_from_a_checkpoint_and_the_reason(option: list[str], tmp_path: Path) -> None:
    output = shown(TORCH_214 if option and TORCH_214 else sys.executable, tmp_path, *option)
    why = "--restart" if option else "training in place needs torch 2.14, this is 2.13"
    assert f"when a node is lost, all workers restart from a checkpoint: {why}" in output
    before, after = pids(output)
    assert not set(after.values()) & set(before.values())
    assert "processes kept: none" in output
    assert "in place:" not in output
