"""The picture of docs/architecture.md: the folders of the package, drawn from the imports in the code.

A folder stands on the floor above the highest folder that it imports. An arrow leads from a folder to a folder that it
imports; imports that follow from other arrows are left out. Long arrows pass each floor through a gap in the row.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Mapping
from functools import cache
from graphlib import TopologicalSorter
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean

WIDTH, MARGIN = 900, 28
BOX, GAP = 112, 26  # widths of a box, and of the gap that an arrow passes through
HEIGHT, FLOOR = 40, 92  # height of a box, and distance from one floor to the next

STYLE = (
    ".bg{fill:#fff}.box{fill:#e3e7fd;stroke:#3f51b5;stroke-width:1.5}.base{fill:#f3f4fb;stroke:#9fa8da}"
    ".l{stroke:#555;stroke-width:1.5;fill:none;marker-end:url(#a)}.h{fill:#555}text{fill:#222;text-anchor:middle}\n"
    "@media(prefers-color-scheme:dark){.bg{fill:#1e2129}.box{fill:#33408a;stroke:#c5cae9}"
    ".base{fill:#242838;stroke:#6371b8}.l{stroke:#bbb}.h{fill:#bbb}text{fill:#eee}}"
)
MARKER = (
    '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="h" d="M0 0 10 5 0 10z"/></marker></defs>'
)

Graph = Mapping[str, set[str]]


def folders(package: Path) -> Graph:
    """For each folder, and each module beside the folders: the folders and such modules that it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).with_suffix("").parts[0]
        if name.startswith("__"):
            continue  # __init__ imports public names only when a program uses them
        imported = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias}" for alias in names]
            imported |= {full.split(".")[1] for full in names if full.startswith(f"{package.name}.")}
    return {name: imported & graph.keys() - {name} for name, imported in graph.items()}


def direct(graph: Graph) -> Graph:
    """The transitive reduction of ``graph``: without the imports that follow from others."""

    @cache
    def below(name: str) -> frozenset[str]:
        return frozenset(graph[name]).union(*map(below, graph[name]))

    return {name: imported - frozenset().union(*map(below, imported)) for name, imported in graph.items()}


def drawing(root: Path) -> str:
    """The picture as SVG. Raises graphlib.CycleError if folders import each other."""
    graph = folders(root / "elastic_hpc")
    base = {name for name in graph if (root / "elastic_hpc" / f"{name}.py").exists()}
    graph = {name: imported - base for name, imported in graph.items() if name not in base}
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = 1 + max((floor[to] for to in graph[name]), default=-1)
    graph, top = direct(graph), max(floor.values())

    # An arrow over several floors gets a waypoint on each floor between them.
    paths = []
    for start, end in sorted((name, to) for name in graph for to in graph[name]):
        waypoints = {f"{start} {end} {level}": level for level in range(floor[start] - 1, floor[end], -1)}
        paths.append([start, *waypoints, end])
        floor |= waypoints
    steps = [step for path in paths for step in pairwise(path)]
    x = _columns(floor, steps, graph)

    height = MARGIN * 2 + FLOOR * top + HEIGHT + FLOOR
    y = {name: MARGIN + FLOOR * (top - level) for name, level in floor.items()}
    parts = [_arrow(path, x, y) for path in paths]
    parts += [_box(x[name], y[name], BOX, name, "box") for name in sorted(graph)]
    words = f"{', '.join(sorted(base))}: all may import them"
    parts.append(_box(WIDTH / 2, height - MARGIN - HEIGHT, WIDTH - 2 * MARGIN, words, "base"))
    label = "The folders of the package elastic_hpc; an arrow leads to a folder that is imported"
    look = f'role="img" aria-label="{label}" font-family="sans-serif" font-size="15"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" {look}>',
            f"<style>\n{STYLE}\n</style>",
            MARKER,
            f'<rect class="bg" width="{WIDTH}" height="{height}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _columns(floor: Mapping[str, int], steps: list[tuple[str, str]], graph: Graph) -> dict[str, float]:
    """The middle of each box and waypoint: near connected boxes, and without overlaps."""
    near: dict[str, list[str]] = {name: [] for name in floor}
    for upper, lower in steps:
        near[upper].append(lower)
        near[lower].append(upper)
    rows = [sorted(name for name in floor if floor[name] == level) for level in range(max(floor.values()) + 1)]
    x = {name: WIDTH * (k + 1) / (len(row) + 1) for row in rows for k, name in enumerate(row)}

    for turn in range(40):
        for row in rows if turn % 2 else reversed(rows):
            wish = {name: mean([x[other] for other in near[name]] or [x[name]]) for name in row}
            row.sort(key=lambda name: (round(wish[name]), name))
            halves = [(BOX if name in graph else 0) / 2 + GAP / 2 for name in row]
            offsets = list(accumulate((left + right for left, right in pairwise(halves)), initial=MARGIN + halves[0]))
            room = WIDTH - 2 * MARGIN - 2 * sum(halves)
            starts = _rising([wish[name] - offset for name, offset in zip(row, offsets, strict=True)])
            places = (min(max(0.0, start), room) + offset for start, offset in zip(starts, offsets, strict=True))
            x |= zip(row, places, strict=True)
    return x


def _rising(values: list[float]) -> list[float]:
    """The rising numbers that are nearest to ``values``: each falling run is replaced by its mean."""
    runs: list[list[float]] = []
    for value in values:
        runs.append([value])
        while len(runs) > 1 and mean(runs[-2]) > mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    return [mean(run) for run in runs for _ in run]


def _arrow(path: list[str], x: Mapping[str, float], y: Mapping[str, float]) -> str:
    points = [(x[path[0]], y[path[0]] + HEIGHT)]
    for name in path[1:-1]:
        points += [(x[name], y[name]), (x[name], y[name] + HEIGHT)]
    points.append((x[path[-1]], y[path[-1]]))
    return f'<path class="l" d="M{" ".join(f"{across:.0f} {down:.0f}" for across, down in points)}"/>'


def _box(x: float, y: float, width: float, words: str, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 25:.0f}">{html.escape(words)}</text>'
    )
