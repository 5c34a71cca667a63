"""``elastic_launch`` on this machine, with real agents."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import elastic_hpc
from elastic_hpc import LaunchConfig, LaunchFailed, UsageError, elastic_launch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_runs_on_every_rank_and_each_result_is_returned() -> None:
    def rank(factor: int) -> tuple[int, str]:
        return factor * int(os.environ["RANK"]), os.environ["WORLD_SIZE"]

    config = LaunchConfig(local=2, nodes=2, nproc_per_node=2, log_dir="runs")
    assert elastic_launch(config, rank)(10) == {0: (0, "4"), 1: (10, "4"), 2: (20, "4"), 3: (30, "4")}


def test_a_failure_is_raised_with_the_traceback_of_the_rank_that_failed_first() -> None:
    def breaks() -> None:
        raise RuntimeError("this is it")

    with pytest.raises(LaunchFailed, match=r"(?s)failed: rank 0 .*in breaks.*RuntimeError: this is it") as failed:
        elastic_launch(LaunchConfig(local=1, max_restarts=0), breaks)()
    assert failed.value.verdict
    assert failed.value.verdict["failure"]["rank"] == 0
    assert failed.value.run_dir.is_dir()


def test_a_script_takes_its_arguments_and_a_refusal_of_elastic_srun_is_no_result(folder: Path) -> None:
    (folder / "train.py").write_text("import sys; open('seen', 'w').write(sys.argv[1])")
    assert elastic_launch(LaunchConfig(local=1), "train.py")(1e-3) == {}
    assert (folder / "seen").read_text() == "0.001"
    with pytest.raises(LaunchFailed, match="the agents left no verdict"):
        elastic_launch(LaunchConfig(local=1, nodes=2), "train.py")()


def test_options_that_do_not_exist_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="max_nodes: unknown option; "):
        LaunchConfig(max_nodes=4)
    with pytest.raises(UsageError, match="--nodes '8-4': expected N or MIN:MAX"):
        LaunchConfig(nodes="8-4")


def test_every_exported_name_exists_and_is_imported_only_when_it_is_used() -> None:
    assert all(getattr(elastic_hpc, name) for name in elastic_hpc.__all__)
    code = "import sys, elastic_hpc; elastic_hpc.JobSpec; print({'torch', 'submitit', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    with pytest.raises(AttributeError):
        elastic_hpc.no_such_thing  # noqa: B018
