"""The first commands of a checkout's user: bin/setup-venv, make clean, mini-slurm in a chroot."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
OTHER = 65534
PYTHON = f"""#!/bin/sh
# a Python whose environments have a pip that only talks
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" "$3/lib"; cp "$0" "$3/bin/python" ;;
  "-u -") PYTHONPATH={{pip}} exec {shlex.quote(sys.executable)} "$@" ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
PIP = """
import os, sys
print("Collecting torch==2.13.0")
print("  Downloading https://x/torch-2.13.0-cp311.whl.metadata (30 kB)")
print("  Downloading https://x/torch-2.13.0-cp311.whl (899.7 MB)")
print("  Downloading https://x/six-1.0.whl (9.1 MB)")
print("Installing collected packages: six, torch")
print("WARNING: this and that", file=sys.stderr)
if os.path.exists("no-torch"):
    sys.exit("ERROR: no such version")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the files that bin/setup-venv reads, and a Python without network access."""
    folder = tmp_path / "checkout"
    for name in ("bin/setup-venv", "pyproject.toml", "constraints.txt", "Makefile"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("benchmarks", "elastic_hpc", "examples", "slurm_templates", "tests"):
        (folder / name).mkdir()
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.py").write_text(PIP)
    program(tmp_path / "python", PYTHON.format(pip=tmp_path / "pip"))
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    for name in [name for name in os.environ if name.startswith(("SUDO_", "PIP_"))]:
        monkeypatch.delenv(name)
    return folder


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def setup(checkout: Path, *before: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [*before, "bin/setup-venv", "docs"]  # without the packages of apt-get
    environ = {**os.environ, **environ}
    return subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, check=False, timeout=60)


def test_setup_shows_what_it_downloads_and_nothing_when_there_is_nothing_to_do(checkout: Path) -> None:
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("setup-venv: ") for line in done.stderr.splitlines()]
    told = ["downloading torch (899.7 MB)", "unpacking 2 packages"]
    assert said[-5:] == [*told, *told, "done: .venv"]  # torch, then the rest
    assert "metadata" not in done.stderr
    assert "WARNING" not in done.stderr
    done = setup(checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_version_of_torch_that_does_not_exist_is_a_failure(checkout: Path) -> None:
    (checkout / "no-torch").touch()
    done = setup(checkout)
    assert done.returncode == 1
    assert "\nERROR: no such version\nsetup-venv: no torch is available here" in done.stderr
    assert not list((checkout / ".venv").glob(".setup-*"))


@pytest.mark.parametrize(("free", "code"), [(1_500_000, 1), (4_000_000, 0)])
def test_setup_checks_the_free_disk_space_before_it_downloads(
    checkout: Path, tmp_path: Path, free: int, code: int
) -> None:
    program(tmp_path / "bin" / "df", f"#!/bin/sh\necho Filesystem\necho /dev/x 1 1 {free} 1% /\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = setup(checkout, PATH=path)
    assert done.returncode == code
    assert f"{checkout} has {free // 1_000_000} GB of free disk space, and torch needs about 6 GB" in done.stderr
    assert (".venv" in os.listdir(checkout)) == (code == 0)
    if code == 0:
        assert setup(checkout, PATH=path).stderr == ""


@AS_ROOT
def test_under_sudo_the_environment_belongs_to_the_owner_of_the_checkout(checkout: Path) -> None:
    under_sudo = {"SUDO_UID": str(OTHER), "SUDO_GID": str(OTHER)}
    assert setup(checkout, **under_sudo).returncode == 0
    assert (checkout / ".venv").stat().st_uid == 0  # a checkout of root
    os.chown(checkout, OTHER, OTHER)
    assert setup(checkout, **under_sudo).returncode == 0
    assert {path.lstat().st_uid for path in [checkout / ".venv", *(checkout / ".venv").rglob("*")]} == {OTHER}
    assert (checkout / "pyproject.toml").stat().st_uid == 0


@AS_ROOT
def test_pip_settings_that_sudo_has_dropped_are_named(checkout: Path, tmp_path: Path) -> None:
    sudo = program(tmp_path / "bin" / "sudo", '#!/bin/sh\nenv -u PIP_INDEX_URL SUDO_UID=1 "$@"; exit $?\n')
    settings = {"PIP_INDEX_URL": "https://mirror", "PIP_CERT": "/x"}
    done = setup(checkout, str(sudo), **settings)
    assert done.returncode == 0, done.stderr
    assert "sudo has dropped PIP_INDEX_URL: pip does without; to keep it, stop here and type: sudo -E" in done.stderr
    shutil.rmtree(checkout / ".venv")
    assert "dropped" not in setup(checkout, **settings, SUDO_UID="1").stderr


def make_clean(checkout: Path, **user: int) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in {"MAKELEVEL", "MAKEFLAGS", "MFLAGS"}}
    return subprocess.run(  # as from a shell, even if make runs the tests
        ["make", "clean"], cwd=checkout, env=environ, capture_output=True, text=True, check=False, **user
    )


def test_make_clean_removes_all_generated_files(checkout: Path) -> None:
    for name in (".venv/lib", ".venv-2.14", ".mypy_cache", "tests/__pycache__", "x.egg-info"):
        (checkout / name).mkdir(parents=True)
    done = make_clean(checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not {".venv", ".venv-2.14", ".mypy_cache", "x.egg-info"} & set(os.listdir(checkout))
    assert os.listdir(checkout / "tests") == []


@AS_ROOT
def test_make_clean_reports_in_one_line_what_only_root_can_remove(checkout: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    for number in range(50):
        path = checkout / ".venv" / "lib" / str(number)
        path.mkdir(parents=True)
        (path / "file").touch()
    os.chown(checkout, OTHER, OTHER)
    done = make_clean(checkout, user=OTHER, group=OTHER)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "make: not removed: .venv (of root); type: sudo make clean"
    assert len(done.stderr.splitlines()) == 2


@AS_ROOT
@pytest.mark.parametrize(
    ("mounts", "said"),
    [
        ("usr", "/proc is not mounted here: type  mount -t proc proc /proc"),
        ("usr proc", "this is a chroot whose / is no mount point, so machines cannot have mounts of their own"),
    ],
)
def test_mini_slurm_reports_in_one_line_why_it_cannot_run_in_a_plain_chroot(
    tmp_path: Path, mounts: str, said: str
) -> None:
    script = f"""
    set -e
    cd {shlex.quote(str(tmp_path))}
    for name in bin lib lib64 sbin; do [ ! -L /$name ] || ln -s usr/$name $name; done
    for name in {mounts}; do mkdir $name; mount --rbind /$name $name; done
    mkdir -p checkout; mount --bind {shlex.quote(str(ROOT))} checkout
    exec chroot . /usr/bin/python3 checkout/bin/mini-slurm --state /state up
    """
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "unshare failed" in done.stderr:
        pytest.skip("no namespaces here")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"mini-slurm: error: {said}")
    assert len(done.stderr.splitlines()) == 1
