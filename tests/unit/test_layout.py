"""Which module of the package may import which: the table in CONTRIBUTING, compared with the code."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "elastic_hpc"

LEAVES = {"errors", "environment", "start"}
"""Modules beside the folders, which import nothing; all folders may import them."""

MAY_IMPORT = {
    "options": set[str](),
    "membership": set[str](),
    "record": {"membership"},
    "slurm": {"options", "membership.nodes"},
    "network": {"membership", "record"},
    "training": {"record"},
    "workers": {"options", "membership", "record", "training"},
    "agent": {"options", "membership", "record", "slurm", "network", "training", "workers"},
    "view": {"membership", "slurm.states"},
    "job": {"options", "slurm", "record", "network.client", "view"},
    "from_batch": {"options", "job"},
    "torchrun": {"options", "membership", "record", "slurm", "network", "workers", "agent"},
    "submitit": {"options", "slurm", "record", "network.client", "training", "job"},
    "rehearse": {"record", "network.client", "training", "job"},
    "doctor": {"options", "slurm", "record", "network.addresses", "job"},
}
"""By folder; ``cli`` may import all. A name with a dot is one module of a folder."""

PURE = ("options", "membership", "view", "errors", "environment", "start")
IMPURE = {"os", "time", "asyncio", "socket", "threading", "subprocess", "select", "pathlib", "io", "tempfile", "shutil"}
"""What pure modules do not import: they touch no file, clock, thread, process, connection, or environment."""

LOCAL_TIME = {"view.times": {"time"}}
"""The exceptions: ``view.times`` reads this machine's time zone, but no clock."""


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {_module(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports(module: str) -> frozenset[str]:
    """All that ``module`` imports, inside functions too; of this package the modules, not the names in them."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module}: expected absolute imports"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in names}
    return frozenset(found)


def place(module: str) -> str:
    """``folder.module`` of a module of the package."""
    return module.removeprefix("elastic_hpc").removeprefix(".")


OURS = sorted(modules())


@pytest.mark.parametrize("module", OURS)
def test_a_module_imports_only_what_its_folder_may(module: str) -> None:
    folder = place(module).partition(".")[0]
    if folder in {"", "__main__", "cli"}:
        return
    allowed = set[str]() if folder in LEAVES else MAY_IMPORT[folder] | LEAVES | {folder}
    wanted = {place(name) for name in imports(module) if name.startswith("elastic_hpc")} - {""}
    assert {name for name in wanted if not {name, name.partition(".")[0]} & allowed} == set()


@pytest.mark.parametrize("module", [name for name in OURS if place(name).partition(".")[0] in PURE])
def test_a_pure_module_imports_nothing_that_touches_the_world(module: str) -> None:
    assert {name for name in imports(module) if name.partition(".")[0] in IMPURE} == LOCAL_TIME.get(
        place(module), set()
    )


def test_no_two_modules_import_each_other_and_no_more_do_in_a_ring() -> None:
    graph = {name: {other for other in imports(name) if other in modules()} for name in modules()}
    graph["elastic_hpc"] = set()  # it finds its public names when they are asked for
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_two_folders_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for name in modules():
        folder = place(name).partition(".")[0]
        others = {place(other).partition(".")[0] for other in imports(name) if other.startswith("elastic_hpc.")}
        if folder:
            graph.setdefault(folder, set()).update(others - {folder})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
