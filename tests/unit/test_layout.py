"""Which module of the package may import which other: the table in CONTRIBUTING, compared with the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "elastic_hpc"

_ROW = re.compile(r"^\| `([a-z_]+)(/?)` \|[^|]*\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
_ROWS = _ROW.findall((ROOT / "CONTRIBUTING.md").read_text())


def _names(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z_.]+)`", cell))


LEAVES = {name for name, folder, _, _ in _ROWS if not folder}
"""Modules beside the folders, which import nothing and which all folders may import."""

MAY_IMPORT = {name: _names(cell) for name, folder, _, cell in _ROWS if folder and cell.strip() != "all"}
"""Allowed imports by folder. A name with a dot is one module of a folder."""

TOUCHES = {name: cell.strip() for name, _, cell, _ in _ROWS}
"""Effects by folder, or module beside the folders. ``nothing``, or ``... else nothing``: pure, except the named
modules.
"""

HARMLESS = {
    *("__future__", "argparse", "bisect", "collections", "contextlib", "dataclasses", "datetime", "difflib", "enum"),
    *("functools", "html", "ipaddress", "itertools", "json", "math", "numbers", "posixpath", "re", "shlex", "signal"),
    *("typing", "jinja2", "markupsafe", "prometheus_client", "rich"),
}
"""Modules that pure modules may import: they use no files, clocks, threads, processes, connections, random numbers or
environment. ``signal`` has only names of numbers, and ``posixpath`` works on text.
"""

EFFECTS = {"network": {"asyncio", "http", "socket", "ssl", "urllib"}, "processes": {"multiprocessing", "subprocess"}}
"""Modules that a folder may import only if it has the effect."""

EXCEPTIONS = {
    "workers.standbys": {"socket"},  # a pair of sockets; a child inherits one of them
    "workers.lives": {"socket"},  # a socket in the local folder, to which workers connect
    "workers.live_worker": {"socket"},  # its connection to that socket
    "start": {"sys"},  # compares an interpreter with this one
    "view.times": {"time"},  # this machine's time zone, but no clock
    "view.timeline": {"importlib"},  # its template, and a library that may be missing
}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "now", "utcnow", "today"}
"""Calls that pure modules must not make; ``now`` and the following names are those of ``datetime``."""


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {_module(path): path for path in PACKAGE.rglob("*.py")}


@cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(modules()[module].read_text())))


@cache
def imports(module: str) -> frozenset[str]:
    """All imports of ``module``, inside functions too; for this package the modules, not the names in them."""
    found = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module}: expected absolute imports"
            assert not node.level, f"{module}: expected absolute imports"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in names}
    return frozenset(found)


def place(module: str) -> str:
    """The name ``folder.module`` of a module of the package."""
    return module.removeprefix("elastic_hpc").removeprefix(".")


def is_pure(module: str) -> bool:
    folder, _, name = place(module).partition(".")
    touches = TOUCHES.get(folder, "")
    return touches.startswith("nothing") or (touches.endswith("else nothing") and name not in _names(touches))


OURS = sorted(modules())
PURE = list(filter(is_pure, OURS))


def test_the_table_has_all_folders_and_shows_which_are_pure() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert MAY_IMPORT.keys() | {"cli"} == folders
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} == LEAVES
    assert {place(name).partition(".")[0] for name in PURE} >= {*LEAVES, "options", "membership", "view"}


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_the_head_of_a_folder_names_its_modules(folder: str) -> None:
    head = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    named = {word for words in re.findall(r"``([^`]+)``", head) for word in re.split(r"[. ]", words)}
    assert {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", "__main__"} - named == set()


@pytest.mark.parametrize("module", OURS)
def test_a_module_imports_only_what_its_folder_may(module: str) -> None:
    folder = place(module).partition(".")[0]
    if folder in {"", "__main__", "cli"}:
        return
    allowed = set[str]() if folder in LEAVES else MAY_IMPORT[folder] | LEAVES | {folder}
    wanted = {place(name) for name in imports(module) if name.startswith("elastic_hpc")} - {""}
    assert {name for name in wanted if not {name, name.partition(".")[0]} & allowed} == set()


@pytest.mark.parametrize("module", [name for name in OURS if "." in name])
def test_no_import_of_ours_bypasses_the_table(module: str) -> None:
    """Public names of the package lead to any folder, and so do computed names."""
    taken, called = set(), set()
    for node in nodes(module):
        if isinstance(node, ast.ImportFrom) and node.module == "elastic_hpc":
            taken |= {alias.name for alias in node.names if f"elastic_hpc.{alias.name}" not in modules()}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            called.add(ast.unparse(node.args[0]))
    assert taken <= {"__version__"}
    assert not any("elastic_hpc" in name for name in called) or place(module) == "cli.hpc"


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_nothing_that_touches_the_world(module: str) -> None:
    harmless = HARMLESS | EXCEPTIONS.get(place(module), set()) | {"elastic_hpc"}
    assert {name for name in imports(module) if name.partition(".")[0] not in harmless} == set()
    functions = [ast.unparse(node.func) for node in nodes(module) if isinstance(node, ast.Call)]
    assert [name for name in functions if name.rpartition(".")[2] in IMPURE_CALLS] == []


@pytest.mark.parametrize("module", sorted({*OURS} - {*PURE}))
def test_a_module_touches_only_what_its_folder_may(module: str) -> None:
    touches = set(re.findall("[a-z]+", TOUCHES.get(place(module).partition(".")[0], "all")))
    barred = {name for effect, names in EFFECTS.items() for name in names if not touches & {effect, "all"}}
    found = {name for name in imports(module) if name.partition(".")[0] in barred}
    assert found <= EXCEPTIONS.get(place(module), set())


def test_no_modules_import_each_other_directly_or_in_a_ring() -> None:
    graph = {name: {other for other in imports(name) if other in modules()} for name in modules()}
    graph["elastic_hpc"] = set()  # ``__init__`` loads its public names on demand
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_two_classes_have_the_same_name() -> None:
    classes = [node.name for name in OURS for node in nodes(name) if isinstance(node, ast.ClassDef)]
    assert {name for name in classes if classes.count(name) > 1} == set()


def test_no_two_test_files_have_the_same_name() -> None:
    names = [path.name for path in (ROOT / "tests").glob("*/*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1 and name != "__init__.py"}) == []


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
