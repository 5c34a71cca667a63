"""Runs the documents' code that needs Slurm, as a user on the cluster."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Cluster
from on_demand import ON_DEMAND

BLOCK = re.compile(r"^```(\w+) slurm( allocation)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [path for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]) if BLOCK.search(path.read_text())]
PATH = f"PATH={Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
SLOW = {"allocations", "torchrun"}
"""Documents whose code takes more than a minute; the tests of their topics run the same commands."""
CASES = [pytest.param(path, marks=ON_DEMAND) if path.stem in SLOW else path for path in DOCUMENTS]
SCRIPT = "import os\nprint('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])\n"


@pytest.mark.parametrize("document", CASES, ids=lambda path: path.stem)
def test_the_code_of_a_document_runs(fresh: Cluster, folder: Path, document: Path) -> None:
    """Python: all blocks of a page form one script. Shell: every command must succeed. Bash: a batch script."""
    found = BLOCK.findall(document.read_text())
    python = "python" in {language for language, _, _ in found}
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("train.py", "first.py", "second.py"):
        if python:
            shutil.copy(ROOT / "examples" / "train_digits.py", folder / name)
        else:
            (folder / name).write_text(SCRIPT)
    for language in ("python", "sh", "bash"):
        for where in ("", " allocation"):
            code = "\n".join(text for shell, place, text in found if (shell, place) == (language, where))
            if code:
                script = folder / f"document.{language}"
                script.write_text(code)
                run = {"python": [sys.executable], "sh": ["bash", "-e"], "bash": ["sbatch", "--wait"]}[language]
                allocated = ["salloc", "--quiet", "--nodes=4"] if where else []
                environ = [PATH, f"TMPDIR={folder}"]  # torchrun leaves its folders there
                fresh.exec([*allocated, "env", *environ, *run, str(script)], cwd=folder, timeout=120)
