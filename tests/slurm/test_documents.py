"""The Python code of the documents that needs Slurm, run by a user on the cluster."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Cluster

BLOCK = re.compile(r"^```python slurm( allocation)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [path for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]) if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_python_code_runs(fresh: Cluster, folder: Path, document: Path) -> None:
    shutil.copy(ROOT / "examples" / "train_digits.py", folder / "train.py")
    found = BLOCK.findall(document.read_text())
    for name, command in (("", []), (" allocation", ["salloc", "--quiet", "--nodes=4"])):
        code = "\n".join(text for where, text in found if where == name)
        if code:
            script = folder / "document.py"
            script.write_text(code)
            fresh.exec([*command, sys.executable, str(script)], cwd=folder, timeout=120)
