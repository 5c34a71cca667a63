"""The environment of workers and of the runs that they start, with real agents on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_hpc.environment import FAMILIES, INSTEAD

SRUN = Path(sys.executable).with_name("elastic-srun")
SHOWS = """
import json, os, pathlib
place = f"{os.environ['ELASTIC_HPC_ROUND']}.{os.environ['RANK']}"
written = pathlib.Path(os.environ["ELASTIC_HPC_RUN_DIR"], f"written.{place}")
written.write_text(json.dumps(dict(os.environ)))
written.rename(written.with_name(f"environ.{place}"))  # whole, or not there: the worker may be killed at any moment
if place == "1.0" and os.path.exists("again"):
    raise SystemExit(3)
"""
NESTS = """
import os, subprocess, sys, time
from pathlib import Path
run = Path(os.environ["ELASTIC_HPC_RUN_DIR"])
if os.environ["ELASTIC_HPC_ROUND"] == "1":
    if sys.argv[3] == "command":
        subprocess.run([sys.argv[1], "--standalone", f"--run-dir={run}/inner", sys.argv[2], str(run)])
    from elastic_hpc import LaunchConfig, elastic_launch
    elastic_launch(LaunchConfig(local=1, log_dir=f"{run}/inner"), sys.argv[2])(str(run))
"""
INNER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "inner.pid").write_text(f"{os.getpid()} {os.environ['ELASTIC_HPC_RUN_DIR']} {os.getppid()}")
time.sleep(600)
"""
DOCUMENT = Path(__file__).parents[2] / "docs" / "training-script.md"


def wait_for(happened: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


BARE = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}


def run(folder: Path, *options: str) -> dict[str, dict[str, str]]:
    """Run SHOWS to its end in ``folder``/run. Returns the environments of all workers, by round and rank."""
    (folder / "shows.py").write_text(SHOWS)
    command = [str(SRUN), "--preload=off", *options, f"--run-dir={folder}/run", str(folder / "shows.py")]
    subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True, env=BARE)
    found = (folder / "run").glob("environ.*")
    return {path.name.partition(".")[2]: json.loads(path.read_text()) for path in found}


def documented() -> set[str]:
    """The variables that the page lists for workers."""
    section = DOCUMENT.read_text().partition("## Variables of the workers")[2].partition("\n## ")[0]
    return set(re.findall(r"`([A-Z][A-Z0-9_]+\*?)`", section))


def test_a_run_without_slurm_has_a_unique_name_for_all_agents_and_rounds_and_for_runs_that_continue_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "again").touch()
    first = run(tmp_path, "--local=2")
    assert first.keys() == {"1.0", "2.0", "2.1"} | ({"1.1"} & first.keys())
    names = {environ["TORCHELASTIC_RUN_ID"] for environ in first.values()}
    names |= {environ["TORCHELASTIC_RUN_ID"] for environ in run(tmp_path, "--local=2", "--again").values()}
    (name,) = names
    assert re.fullmatch("[0-9a-f]{16}", name)
    (tmp_path / "other").mkdir()
    other = run(tmp_path / "other", "--standalone")
    assert other["1.0"]["TORCHELASTIC_RUN_ID"] != name
    (tmp_path / "named").mkdir()
    assert run(tmp_path / "named", "--standalone", "--rdzv-id=mine")["1.0"]["TORCHELASTIC_RUN_ID"] == "mine"


def test_every_variable_that_we_set_or_remove_for_a_worker_is_documented(tmp_path: Path) -> None:
    (told,) = run(tmp_path, "--standalone", "--interface=lo").values()
    others = {
        "LC_CTYPE",
        "PWD",
    }  # variables of Python, and of the shell that starts a pip command at a path with a blank
    changed = {name for name in told if told[name] != BARE.get(name)} - others
    assert not changed - documented()
    families = tuple(name.rstrip("*") for name in documented() if name.endswith("*"))
    assert not {name for name in INSTEAD if name not in documented() and not name.startswith(families)}
    assert {name.rstrip("*") for name in FAMILIES} <= set(families)


@pytest.mark.parametrize("way", ["command", "Python"])
def test_a_run_that_a_worker_starts_is_separate_and_ends_with_that_worker(tmp_path: Path, way: str) -> None:
    for name, text in {"nests.py": NESTS, "inner.py": INNER}.items():
        (tmp_path / name).write_text(text)
    command = [str(SRUN), "--standalone", f"--run-dir={tmp_path}/run", str(tmp_path / "nests.py")]
    outer = subprocess.Popen([*command, str(SRUN), str(tmp_path / "inner.py"), way], cwd=tmp_path)
    try:
        started = tmp_path / "run" / "inner.pid"
        wait_for(lambda: started.exists() and started.read_text().count(" ") == 2)
        pid, run_dir, agent = started.read_text().split()
        assert run_dir.startswith(f"{tmp_path}/run/inner")
        worker = parent(parent(int(agent)))
        os.kill(worker, signal.SIGKILL)
        assert outer.wait(60) == 0, "the second round starts none"
        wait_for(lambda: not any(Path(f"/proc/{left}").exists() for left in (pid, agent)), 10)
    finally:
        outer.kill()
        outer.wait()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
