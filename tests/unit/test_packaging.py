import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from elastic_hpc import __version__

ROOT = Path(__file__).parents[2]
TEMPLATES = {path.name for path in (ROOT / "slurm_templates").iterdir()}


def run(*words, cwd, **environ):
    environ = {**os.environ, **environ}
    return subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=ROOT)
    return folder


def test_the_wheel_has_the_templates_the_license_and_the_commands(built):
    with zipfile.ZipFile(built / f"elastic_hpc-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        points = wheel.read(f"elastic_hpc-{__version__}.dist-info/entry_points.txt").decode()
    assert {f"elastic_hpc/slurm_templates/{name}" for name in TEMPLATES} <= names
    own = f"elastic_hpc-{__version__}"
    assert {name.partition("/")[0] for name in names} == {"elastic_hpc", f"{own}.data", f"{own}.dist-info"}
    assert f"{own}.data/data/share/man/man1/elastic-sbatch.1" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for command in ("sbatch", "srun", "hpc"):
        assert f"elastic-{command} = elastic_hpc.cli.{command}:main" in points


def test_the_sdist_has_what_a_checkout_has(built):
    with tarfile.open(built / f"elastic_hpc-{__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"slurm_templates/{name}" for name in TEMPLATES} <= names
    assert {"bin/elastic-sbatch", "bin/mini-slurm", "tests/unit/test_packaging.py", "pyproject.toml"} <= names


def test_an_installed_wheel_finds_its_templates(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, "-m", "elastic_hpc.cli.sbatch", "--dry-run", "-N1", "train.py"]
    assert run(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path)).startswith("#!/bin/bash\n")


def test_an_editable_install_finds_the_checkouts_templates(tmp_path):
    code = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(tmp_path)
    (tmp_path / "train.py").write_text("")
    code = (
        f"import site, sys; before = [*sys.path]; site.addsitedir({str(tmp_path)!r})\n"
        "sys.path[:0] = [path for path in sys.path if path not in before]\n"  # before another checkout's
        "from elastic_hpc.cli.sbatch import main; main(['--dry-run', '-N1', 'train.py'])\n"
        "import elastic_hpc; print(elastic_hpc.__file__)"
    )
    out = run(sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code, cwd=tmp_path)
    assert out.startswith("#!/bin/bash\n")
    assert out.splitlines()[-1] == str(ROOT / "elastic_hpc" / "__init__.py")


def test_a_plain_checkout_runs_the_command_from_anywhere_and_hands_itself_to_the_job(tmp_path):
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, str(ROOT / "bin" / "elastic-sbatch"), "-N1", "--parsable", "train.py"]
    assert run(*command[:2], "--dry-run", *command[2:], cwd=tmp_path).startswith("#!/bin/bash\n")
    stub = tmp_path / "sbatch"
    stub.write_text("#!/bin/sh\necho $PYTHONPATH\n")
    stub.chmod(0o755)
    path = run(*command, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH="/else")
    assert path == f"{ROOT}:/else\n"


def test_no_command_of_a_checkout_is_forgotten():
    for command in ("sbatch", "srun", "hpc"):
        path = ROOT / "bin" / f"elastic-{command}"
        assert os.access(path, os.X_OK)
        assert f"from elastic_hpc.cli.{command} import main" in path.read_text()
