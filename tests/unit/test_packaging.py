import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import installer
import pytest
from installer.destinations import SchemeDictionaryDestination
from installer.sources import WheelFile

import elastic_hpc
from elastic_hpc import __version__, training

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


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The interpreter of an environment that uv has made, with only the wheel."""
    folder = tmp_path_factory.mktemp("uv") / "environment"
    uv(folder.parent, "venv", "--python", sys.executable, folder)
    uv(folder.parent, "pip", "install", "--no-deps", "--python", folder / "bin" / "python", wheel)
    return folder / "bin" / "python"


def uv(cwd, *words):
    cache = {"UV_CACHE_DIR": str(cwd / "cache"), "UV_PYTHON_DOWNLOADS": "never", "UV_NO_CONFIG": "1"}
    return run(sys.executable, "-m", "uv", "--offline", *words, cwd=cwd, **cache)


def entry_points(text):
    """The entry points as strict readers see them: those of TensorBoard, Poetry, PDM, pip on Python 3.10 and uv accept
    no duplicate key.
    """
    parser = configparser.ConfigParser(delimiters=("=",), strict=True)
    parser.optionxform = str
    parser.read_string(text)
    return {group: dict(parser[group]) for group in parser.sections()}


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
    assert "elastic_hpc/py.typed" in names


def test_every_entry_point_has_a_unique_key_and_an_existing_target(wheel):
    with WheelFile.open(wheel) as source:
        text = source.read_dist_info("entry_points.txt")
    found = entry_points(text)
    assert found.keys() == {"console_scripts", "submitit", "torchrun.handlers"}
    for group, points in found.items():
        for name, value in points.items():
            assert callable(EntryPoint(name.strip(), value, group).load())


def test_the_sdist_has_the_files_of_a_checkout(built):
    with tarfile.open(built / f"elastic_hpc-{__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"slurm_templates/{name}" for name in TEMPLATES} <= names
    assert {"bin/elastic-sbatch", "bin/mini-slurm", "bin/mini_slurm/cluster.py", "pyproject.toml"} <= names
    assert "tests/unit/test_packaging.py" in names


def test_an_installed_wheel_finds_its_templates(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    (tmp_path / "train.py").write_text("pass")
    command = [sys.executable, "-m", "elastic_hpc.cli.sbatch", "--dry-run", "-N1", "train.py"]
    assert run(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path)).startswith("#!/bin/bash\n")


def test_an_editable_install_finds_the_checkouts_templates(tmp_path):
    code = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        wheel.extractall(tmp_path)
    (tmp_path / "train.py").write_text("pass")
    code = (
        f"import site, sys; before = [*sys.path]; site.addsitedir({str(tmp_path)!r})\n"
        "sys.path[:0] = [path for path in sys.path if path not in before]\n"  # before the path of another checkout
        "from elastic_hpc.cli.sbatch import main; main(['--dry-run', '-N1', 'train.py'])\n"
        "import elastic_hpc; print(elastic_hpc.__file__)"
    )
    out = run(sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code, cwd=tmp_path)
    assert out.startswith("#!/bin/bash\n")
    assert out.splitlines()[-1] == str(ROOT / "elastic_hpc" / "__init__.py")


def test_a_plain_checkout_runs_the_command_from_any_folder_and_the_job_uses_the_same_checkout(tmp_path):
    (tmp_path / "train.py").write_text("pass")
    command = [sys.executable, str(ROOT / "bin" / "elastic-sbatch"), "-N1", "--parsable", "train.py"]
    assert run(*command[:2], "--dry-run", *command[2:], cwd=tmp_path).startswith("#!/bin/bash\n")
    stub = tmp_path / "sbatch"
    stub.write_text("#!/bin/sh\necho $PYTHONPATH\n")
    stub.chmod(0o755)
    path = run(*command, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH="/else")
    assert path == f"{ROOT}:/else\n"


def test_every_command_exists_in_a_checkout():
    for command in ("sbatch", "srun", "hpc"):
        path = ROOT / "bin" / f"elastic-{command}"
        assert os.access(path, os.X_OK)
        assert f"from elastic_hpc.cli.{command} import main" in path.read_text()


def test_uv_installs_the_wheel_with_its_commands(installed):
    listed = "from importlib.metadata import entry_points; print(*(e.name for e in entry_points(group='submitit')))"
    assert run(installed, "-c", listed, cwd=installed.parent).split() == ["executor", "job_environment"]
    for command in ("sbatch", "srun", "hpc"):
        assert os.access(installed.with_name(f"elastic-{command}"), os.X_OK)


def test_installer_installs_the_wheel_with_its_commands(wheel, tmp_path):
    scheme = {name: str(tmp_path / name) for name in ("purelib", "platlib", "headers", "scripts", "data")}
    with WheelFile.open(wheel) as source:
        installer.install(source, SchemeDictionaryDestination(scheme, sys.executable, "posix"), {})
    assert {path.name for path in (tmp_path / "scripts").iterdir()} == {"elastic-sbatch", "elastic-srun", "elastic-hpc"}
    assert (tmp_path / "data" / "share" / "man" / "man1" / "elastic-hpc.1").exists()


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_pip_of_another_python_installs_the_wheel(version, wheel, tmp_path):
    python = other_python(version)
    run(python, "-m", "pip", "--no-input", "install", "--no-index", "--no-deps", "--target", ".", wheel, cwd=tmp_path)
    assert {f"elastic-{command}" for command in ("sbatch", "srun", "hpc")} <= {*os.listdir(tmp_path / "bin")}
    shown = "import elastic_hpc.training; print(elastic_hpc.training.__file__)"
    assert run(python, "-c", shown, cwd=tmp_path) == f"{tmp_path}/elastic_hpc/training/__init__.py\n"


def other_python(version):
    """Another Python with pip, found by its name or by pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for found in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))):
        usable = [found, "-m", "pip", "--version"]
        if found and subprocess.run(usable, capture_output=True, check=False).returncode == 0:
            return found
    pytest.skip(f"this machine has no Python {version} with pip, neither in PATH nor by pyenv")


USER = """
import elastic_hpc
from elastic_hpc import Job, JobSpec, UsageError
from elastic_hpc.training import Share, drain_requested, report_progress

spec: JobSpec = JobSpec.of("train.py", nodes="2:4")
job: Job = elastic_hpc.submit(spec)
script: str = elastic_hpc.render(spec)
state: str = job.status().state
step: int = job.id  # type: ignore[assignment]
job.nosuch  # type: ignore[attr-defined]
elastic_hpc.nosuch  # type: ignore[attr-defined]
elastic_hpc.training.report_progress("one")  # type: ignore[arg-type]
report_progress(1, 0.5)
stop: bool = drain_requested()
results = elastic_hpc.elastic_launch(elastic_hpc.LaunchConfig(local=2), len)("x")
error: Exception = UsageError("x")
"""


def test_a_users_program_is_checked_against_the_types_of_the_installed_package(installed, tmp_path):
    (tmp_path / "program.py").write_text(USER)
    strict = ["--strict", "--python-executable", installed, "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *strict, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_public_names_are_listed_and_documented_and_no_others_are_used_in_documents_and_examples():
    assert {*elastic_hpc.__all__, "training"} <= set(dir(elastic_hpc))
    assert [name for name in dir(elastic_hpc) if name[0] != "_"] == sorted([*elastic_hpc.__all__, "training"])
    for module in (elastic_hpc, training):
        assert all(getattr(module, name) is not None for name in module.__all__)
    texts = [path.read_text() for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("examples/*.py"))]
    imported = re.compile(r"^ *(?:from|import) (elastic_hpc[.\w]*)", re.MULTILINE)
    homes = {"elastic_hpc", "elastic_hpc.training", "elastic_hpc.training.lightning"}
    assert {name for text in texts for name in imported.findall(text)} == homes
