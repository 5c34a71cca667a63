"""Our processes do not import modules of the working directory that have names of the library's modules or of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_hpc.start import module_command

COMMANDS = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
TRAIN = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
assert sys.path[0] == os.path.dirname(os.path.realpath(__file__)), sys.path
assert os.getcwd() not in sys.path, sys.path
import mailbox  # beside the script: what python src/train.py would import
assert mailbox.MINE
assert "PYTHONSAFEPATH" not in os.environ
print("rank", dist.get_rank(), "of", dist.get_world_size())
dist.destroy_process_group()
"""


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which every import of a library module, of torch or of our modules would fail."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    folder = tmp_path / "project"
    for name in ("torch", "rich", "jinja2", "tomli", "submitit", "cloudpickle", "elastic_hpc", "sitecustomize"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} of the working directory')")
    for name in sys.stdlib_module_names - {"__main__"}:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')")
    (folder / "src").mkdir()
    (folder / "src" / "train.py").write_text(TRAIN)
    (folder / "src" / "mailbox.py").write_text("MINE = True")
    monkeypatch.chdir(folder)
    return folder


def run(*command: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=120
    )
    assert done.returncode == code, done.stdout
    assert "of the working directory" not in done.stdout
    return done.stdout


def test_a_job_and_every_command_run_in_a_folder_of_modules_named_like_the_librarys(crowded: Path) -> None:
    said = run(COMMANDS / "elastic-srun", "--local", "2", "src/train.py")
    assert "finished" in said
    assert "rank 0 of 2" in run(COMMANDS / "elastic-hpc", "logs", "elastic-logs/local.0")
    for command in ["status", "--json"], ["why"], ["timeline", "--html", "a.html"]:
        run(COMMANDS / "elastic-hpc", command[0], "elastic-logs/local.0", *command[1:])
    run(sys.executable, ROOT / "bin" / "elastic-srun", "--local", "1", "src/train.py")


@pytest.mark.parametrize("name", ["python", "python3"])
def test_a_module_of_ours_runs_there_with_any_interpreter(
    crowded: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With this interpreter, and with another one of which only the name is known."""
    folder = crowded.parent / "on the path"
    folder.mkdir()
    (folder / "shows.py").write_text(
        "import os, sys; print(sys.argv[1:], os.getcwd() in sys.path, __name__, os.environ)"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    python = str(COMMANDS / name)
    said = run(*module_command(python, "shows", "a b", "-c"))
    assert said.startswith("['a b', '-c'] False __main__ ")
    assert "PYTHONSAFEPATH" not in said
    assert "elastic-srun" in run(*module_command(python, "elastic_hpc.cli.srun", "--help"))
