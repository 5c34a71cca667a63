"""The commands, options, variables and files in the documents exist."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from elastic_hpc.options.of_joiners import JOINERS
from elastic_hpc.options.sbatch import SBATCH
from elastic_hpc.options.torchrun import OPTIONS as TORCHRUN

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OURS = {"elastic-sbatch", "elastic-srun", "elastic-hpc", "mini-slurm"}
OTHERS = {"salloc", "apt-get", "git", "pip", "make", "cd", "torchrun", "srun"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
ON_SLURM = ("sh slurm", "sh slurm allocation")
BLOCK = re.compile(r"^```([\w ]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def help_of(*command: str) -> str:
    path = [sys.executable, str(ROOT / "bin" / command[0]), *command[1:], "--help"]
    return subprocess.run(path, capture_output=True, text=True, check=True, timeout=60).stdout


def options_of(command: str) -> set[str]:
    """Long options that ``command`` accepts before the script."""
    listed = "" if command == "elastic-sbatch" else help_of(command)
    subcommands = re.findall(r"^    ([a-z-]+)(?: |$)", listed, re.MULTILINE)
    known = set(OPTION.findall(" ".join([help_of(command), *(help_of(command, name) for name in subcommands)])))
    known |= {f"--{name}" for name in (*SBATCH, *JOINERS)} if command == "elastic-sbatch" else set()
    return known | ({option.flag for option in TORCHRUN} if command in {"elastic-sbatch", "elastic-srun"} else set())


def blocks(document: Path, *kinds: str) -> list[str]:
    """Blocks without the mark ``slurm``; tests/slurm/test_documents.py runs the marked ones."""
    return [text for found, text in BLOCK.findall(document.read_text()) if found in kinds]


def command_lines(document: Path) -> list[list[str]]:
    lines = [line for block in blocks(document, "sh", *ON_SLURM) for line in block.splitlines()]
    shown = [line[2:] for block in blocks(document, "text") for line in block.splitlines() if line.startswith("$ ")]
    parts = [part for line in [*lines, *shown] for part in line.split(" && ")]
    return [words for part in parts if (words := shlex.split(part.removeprefix("sudo "), comments=True))]


@each_document
def test_commands_in_code_blocks_exist_and_accept_their_options(document: Path) -> None:
    for words in command_lines(document):
        names = [os.path.basename(word) for word in words]
        assert names[0] in OURS | OTHERS, words
        if names[0] == "make":
            targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert targets
            assert words[1] in targets[1].split(), words
        for at, name in enumerate(names):
            if name in OURS:
                script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
                given = {match for word in words[at:script] for match in OPTION.findall(word)}
                assert given <= options_of(name), words
                if name in {"elastic-hpc", "mini-slurm"}:
                    assert re.search(rf"^    (\w+ \()?{words[at + 1]}\)?\s", help_of(name), re.MULTILINE), words


@each_document
def test_options_and_variables_named_in_the_text_exist(document: Path) -> None:
    text = BLOCK.sub("", document.read_text())
    known = {"--help", "--standalone"} | {f"--{name}" for name in SBATCH}
    known = known.union(*(options_of(command) for command in OURS))
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    assert set(OPTION.findall(code)) <= known
    files = [*ROOT.glob("elastic_hpc/**/*.py"), *ROOT.glob("bin/mini_slurm/*.py"), *ROOT.glob("tests/*.py")]
    sources = "".join(path.read_text() for path in files)
    sources += (ROOT / "tests" / "slurm" / "test_faults.py").read_text()
    for name in re.findall(r"\b(?:ELASTIC_HPC|MINI_SLURM)_[A-Z0-9_]+", text):
        assert name in sources, name


@each_document
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


def test_the_files_and_functions_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path, name in re.findall(r"`(\w+/\w+\.py)(?:: ([\w.]+))?`", text):
        assert (ROOT / "elastic_hpc" / path).is_file(), path
        scope: ast.AST = ast.parse((ROOT / "elastic_hpc" / path).read_text())
        for part in filter(None, name.split(".")):
            defined = [node for node in ast.iter_child_nodes(scope) if getattr(node, "name", "") == part]
            assert defined, f"{path}: {name}"
            scope = defined[0]


@each_document
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            for alias in node.names if isinstance(node, ast.Import) else []:
                importlib.import_module(alias.name)
        exec(compile(block, str(document), "exec"), {"__name__": "__main__"})


def test_the_reference_has_only_public_names() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs" / "generator").glob("*.py"))
    assert re.findall(r"from elastic_hpc\S* import .*\b_[a-z]\w*|\b(?:hpc|srun|sbatch)\._\w+", text) == []
