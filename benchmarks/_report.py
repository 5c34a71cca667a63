"""What all benchmarks share besides measuring: arguments, tables, a file of results, a description of the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elastic_hpc import __version__

ROOT = Path(__file__).resolve().parents[1]
_DEFAULT_STATE = os.environ.get("MINI_SLURM_STATE", "/var/lib/mini-slurm-benchmarks")


class BenchmarkError(Exception):
    """A run that says nothing about the launchers. The user sees the message as it is."""


def run_main(main: Callable[[], int]) -> int:
    """The exit code of ``main``; an error is printed in one line."""
    try:
        return main()
    except (BenchmarkError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def kept(runs: Sequence[object]) -> Iterator[None]:
    """Print an error or Ctrl-C that ends the block; the measurements in ``runs`` can still be shown."""
    program = os.path.basename(sys.argv[0])
    try:
        yield
    except (BenchmarkError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{program}: stopped after {len(runs)} runs", file=sys.stderr)


# arguments


def parser_with(
    doc: str | None, names: Mapping[str, str], *examples: str, state: bool = False, keep: bool = False
) -> argparse.ArgumentParser:
    """A parser whose help explains ``names`` (a name without a text is a heading) and shows ``examples``. It has
    ``--json``; with ``state`` also ``--state``, the directory of ``_cluster.cluster``, and with ``keep`` ``--keep``.
    """
    width = max(map(len, names), default=0) + 2
    lines = [f"  {name:<{width}}{text}" if text else name for name, text in names.items()]
    if examples:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, epilog="\n".join(lines))
    add = parser.add_argument
    add("--json", type=_file_to_write, metavar="FILE", help="write all results and where they were measured")
    if state:
        text = "mini-slurm's directory; one that is up is used and left up (default: $MINI_SLURM_STATE or %(default)s)"
        add("--state", type=Path, default=_DEFAULT_STATE, metavar="DIR", help=text)
    if keep:
        add("--keep", type=Path, metavar="DIR", help="copy each job's logs, events and steps there")
    return parser


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0, for example 3")


def _file_to_write(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a folder that exists")
    return Path(text)


# results


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the file of ``--json``, if it was given."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def show(table: Table, width: int = 140) -> None:
    """Print ``table``; where standard output is no terminal, ``width`` characters wide."""
    Console(width=None if sys.stdout.isatty() else width).print(table)


def table_of(title: str, names: Iterable[str], left: Iterable[str] = ("",)) -> Table:
    """A table without rows. Columns are aligned to the right, except those in ``left``."""
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def figure(
    name: str, ours: float | None, peer: str, theirs: float | None, *, unit: str = "s", note: str = ""
) -> dict[str, Any]:
    """A line of run.py's table. ``theirs``: None if there is no value; ``note`` says why."""
    ratio = theirs / ours if ours and theirs is not None else None
    return {"name": name, "ours": ours, "peer": peer, "theirs": theirs, "ratio": ratio, "unit": unit, "note": note}


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, minimum and maximum of the values that are not None."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}


def spread_text(values: Mapping[str, float] | None, digits: int) -> str:
    if not values:
        return "-"
    median, least, most = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


# the machine


def machine() -> dict[str, Any]:
    """The machine and the versions: a figure means nothing without them."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "elastic_hpc": __version__,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
    }


def busy(seconds: float = 1.0) -> float:
    """Share of this machine that is busy during the next ``seconds``, 0 to 1; if we run nothing, others cause it."""

    def ticks() -> tuple[int, int]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle and waiting for a disk

    total, idle = ticks()
    time.sleep(seconds)
    later_total, later_idle = ticks()
    return 1 - (later_idle - idle) / max(1, later_total - total)


def origin(where: Mapping[str, Any], busy_before: Sequence[float], versions: Mapping[str, str] | None = None) -> str:
    """One line: ``where`` is from ``machine``, ``busy_before`` from ``busy``, ``versions`` are those of the peers."""
    shown = {"torch": where["torch"], "Slurm": where.get("slurm"), "Python": where["python"], **(versions or {})}
    names = ", ".join(f"{name} {number}" for name, number in shown.items() if number)
    least, most = f"{min(busy_before):.0%}", f"{max(busy_before):.0%}"
    share = least if least == most else f"{least} to {most}"
    return f"{where['date']}: {names}, {where['cores']} cores, of which others used {share} before the runs"
