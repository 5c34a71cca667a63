"""The site, the man pages and the shell completion are generated from the code, up to date, and work."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("docs", "examples", "benchmarks", "mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

COMPLETE = r"""
source "$1"; shift
name=$1 COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
function=$(complete -p "$name"); function=${function#*-F }
"${function%% *}"
printf '%s\n' "${COMPREPLY[@]}"
"""


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", folder / "mkdocs.yml"]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, "--site-dir", site], env=environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this checkout."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the site's sources that a test may damage."""
    for name in SOURCES:
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def complete(tmp_path: Path) -> Callable[..., set[str]]:
    """The words that bash offers for the last word, in a folder with a script and two
    jobs; a third job is remembered.
    """
    (tmp_path / "elastic-logs" / "4711").mkdir(parents=True)
    (tmp_path / "elastic-logs" / "4712.0").mkdir()
    (tmp_path / "train.py").touch()
    (tmp_path / "data.txt").touch()
    (tmp_path / "state" / "elastic_hpc").mkdir(parents=True)
    (tmp_path / "state" / "elastic_hpc" / "jobs").write_text("/scratch/elsewhere/4713\n")
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}

    def offered(*words: str) -> set[str]:
        command = ["bash", "--norc", "-c", COMPLETE, "bash", str(ROOT / "completion" / f"{words[0]}.bash"), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True, timeout=20
        )
        assert not done.stderr
        return set(done.stdout.split())

    return offered


def test_the_generated_files_match_the_code() -> None:
    stale = runpy.run_path(str(ROOT / "bin" / "docs"))["stale"]()
    assert not stale, f"not up to date: {', '.join(map(str, stale))}; type: bin/docs build"


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert pages
    assert [page for page in pages if loaded.search(page.read_text())] == []


def test_links_out_of_the_pages_lead_to_pages_of_the_site(site: Path) -> None:
    assert 'href="project/examples/train_digits.py.html"' in (site / "quickstart.html").read_text()
    assert "torch.distributed" in re.sub(r"<[^>]+>", "", (site / "project/examples/train_digits.py.html").read_text())
    assert 'href="../../mini-slurm.html"' in (site / "project/benchmarks/index.html").read_text()


def test_a_broken_link_and_an_unlinked_page_fail_the_build(checkout: Path) -> None:
    broken = ["nowhere.md", "growing.md#nowhere", "../examples/nowhere.py", "img/nowhere.svg"]
    with open(checkout / "docs" / "limits.md", "a") as page:
        page.writelines(f"\n[a link]({link})\n" for link in broken)
    (checkout / "docs" / "lost.md").write_text("# Lost\n")
    done = build(checkout, checkout / "site")
    assert done.returncode == 1
    for name in [*broken, "lost.md"]:
        assert name in done.stderr


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff")
@pytest.mark.parametrize("name", ["elastic-sbatch", "elastic-srun", "elastic-hpc"])
def test_a_man_page_is_rendered_without_a_warning(name: str) -> None:
    command = ["groff", "-man", "-ww", "-Tascii", "-P-cbou", str(ROOT / "man" / f"{name}.1")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    assert not done.stderr
    assert f"{name} - " in done.stdout
    assert "--help" in done.stdout


@needs_bash
def test_options_of_ours_and_of_sbatch_are_completed(complete: Callable[..., set[str]]) -> None:
    offered = complete("elastic-sbatch", "--no")
    assert {"--nodes", "--nodelist"} <= offered
    assert "--no-requeue" not in offered  # the command would refuse it


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["elastic-sbatch", "--container-runtime", ""], {"pyxis", "apptainer", "oci"}),
        (["elastic-sbatch", "--grow", "=", ""], {"on", "off"}),
        (["elastic-srun", "--free-growth", "=", ""], {"on", "off"}),
        (["elastic-srun", "--loc"], {"--local", "--local-ranks-filter"}),
        (["elastic-sbatch", "--nodes", "=", "2", ":", "4", "--grow", "tr"], {"train.py"}),
        (["elastic-sbatch", "-N", "4", "train.py", "--data", "da"], {"data.txt"}),
        (["elastic-sbatch", "-N", "4", "train.py", "--no"], set()),
        (["elastic-hpc", "dra"], {"drain"}),
        (["elastic-hpc", "rehearse", "train.py", "--ac"], set()),
        (["elastic-hpc", "rehearse", "tr"], {"train.py"}),
        (["elastic-hpc", "stop", "--aft"], {"--after-checkpoint"}),
        (["elastic-hpc", "stop", "47"], {"4711", "4712.0", "4713"}),
    ],
)
def test_a_word_is_completed(complete: Callable[..., set[str]], words: list[str], expected: set[str]) -> None:
    assert complete(*words) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_can_read_its_completion() -> None:
    subprocess.run(["zsh", "-n", str(ROOT / "completion" / "_elastic-hpc")], check=True, timeout=20)
