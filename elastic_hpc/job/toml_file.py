"""A TOML file, for configuration or for one job: options by their long names, with values as on the command line. Reads
the file.

Habits of TOML users are accepted: ``_`` for ``-`` in a key, a table of variables, a string in place of a list with one
string. A file that could mean two things is refused.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

from elastic_hpc.errors import UsageError, did_you_mean
from elastic_hpc.options.of_joiners import JOINERS, is_for_joiners
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, SBATCH, Given, Option, is_for_containers, named
from elastic_hpc.options.table import ELASTIC, Layer

_WHAT_RUNS = ("script", "args", "module", "no-python")
"""Keys that only a job file may have."""


class JobFile(NamedTuple):
    """A job: its options, and what it runs. ``script`` is empty if the command line must name the script."""

    layer: Layer
    script: str
    args: tuple[str, ...]
    module: bool
    no_python: bool


def read(path: Path, source: str) -> Layer:
    """What the file at ``path`` sets. Messages call the file ``source``. The value false unsets an option of sbatch.
    Raises UsageError.
    """
    return _layer(_table(path), path, source)


def read_job(path: Path, source: str) -> JobFile:
    """The job that the file at ``path`` describes. Raises UsageError."""
    table = _table(path)
    named = {name: (key, table.pop(key)) for key, name, _ in list(_by_name(table, "")) if name in _WHAT_RUNS}

    def switch(name: str) -> bool:
        key, value = named.get(name, (name, False))
        if not isinstance(value, bool):
            raise UsageError(f"{key} = {_shown(value)}: expected true or false")
        return value

    _, script = named.get("script", ("", ""))
    if not isinstance(script, str):
        raise UsageError(f"script = {_shown(script)}: expected the path of the training script")
    _, args = named.get("args", ("", []))
    if not isinstance(args, list):
        raise UsageError(f"args = {_shown(args)}: expected a list of words, for example args = ['--lr', '1e-3']")
    if not script and named:
        raise UsageError(f"{next(iter(named))}: needs a script too, for example script = 'train.py'")
    words = tuple(_text("args", word) for word in args)
    return JobFile(_layer(table, path, source), script, words, switch("module"), switch("no-python"))


def _table(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):  # here, because a submission without a file does not need it
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: dict[str, Any] = tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors mark UTF-8
    except OSError as error:
        raise UsageError(f"{error.strerror or error}; expected a TOML file that can be read") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(str(error)) from None
    return table


def _layer(table: dict[str, Any], path: Path, source: str) -> Layer:
    rows = table.pop("sbatch", {})
    if not isinstance(rows, dict):
        raise UsageError(f"sbatch = {_shown(rows)}: expected a table, [sbatch]")
    _flatten(table)
    of_joiners = {key: table.pop(key) for key in list(table) if is_for_joiners(_long(key))}
    found = [(f"[sbatch] {key}", _option(key, name), value) for key, name, value in _by_name(rows, "[sbatch] ")]
    found += [(key, _option_of_joiners(key, name), value) for key, name, value in _by_name(of_joiners, "")]
    given, unset = [], []
    for key, option, value in found:
        if value is False:
            unset.append(option.name)
        else:
            given.append(Given(option, _sbatch_value(key, option, value), source))
    return Layer(source, list(_options(table, path)), given, unset)


def _flatten(table: dict[str, Any]) -> None:
    """Write ``[grow] NAME = value`` as ``grow-NAME = value``, and ``[grow] on = value`` as ``grow = value``."""
    rows = table.get("grow")
    if not isinstance(rows, dict):
        return
    del table["grow"]
    known = {_long(key) for key in table}
    for key, name, value in _by_name(rows, "[grow] "):
        long = "grow" if name == "on" else f"grow-{name}"
        if long in known:
            raise UsageError(f"[grow] {key}: {long} is set too; leave out one of the two")
        table[long] = value


def _option_of_joiners(key: str, name: str) -> Option:
    if name not in JOINERS:
        raise UsageError(f"{key}: unknown option of sbatch for joiners{_closest(name, [*ELASTIC, *JOINERS])}")
    return JOINERS[name]


def _long(key: str) -> str:
    """The long name of an option that ``key`` stands for."""
    return key.removeprefix("--").replace("_", "-")


def _by_name(table: dict[str, Any], place: str) -> Iterator[tuple[str, str, Any]]:
    """Each key as it is written, the long name it stands for, and its value."""
    seen: dict[str, str] = {}
    for key, value in table.items():
        name = _long(key)
        if name in seen:
            raise UsageError(f"{place}{key}: {seen[name]} is set too; leave out one of the two")
        seen[name] = key
        yield _plain(key), name, value


def _plain(key: str) -> str:
    """``key`` on one line, whatever characters it has."""
    return key if re.fullmatch(r"[\w-]+", key) else repr(key)


def _options(table: dict[str, Any], path: Path) -> Iterable[tuple[str, str]]:
    for key, name, value in _by_name(table, ""):
        if name not in ELASTIC:
            if name in SBATCH:
                raise UsageError(f"{key}: unknown key; it is sbatch's own option: write it under [sbatch]")
            if name in _WHAT_RUNS:
                raise UsageError(f"{key}: belongs in a job file, for elastic-sbatch --file FILE")
            raise UsageError(
                f"{key}: unknown key{_closest(name, [*ELASTIC, *_WHAT_RUNS])}; sbatch's own options go under [sbatch]"
            )
        if name == "env" and isinstance(value, dict):
            yield from ((name, _variable(variable, content)) for variable, content in value.items())
        elif ELASTIC[name].repeated:
            lines = [value] if isinstance(value, str) else value
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                table_too = ', or a table, for example env = {NAME = "VALUE"}' if name == "env" else ""
                expected = f"a list of strings, for example {key} = ['...']{table_too}"
                raise UsageError(f"{key} = {_shown(value)}: expected {expected}")
            yield from ((name, line) for line in lines)
        elif ELASTIC[name].is_switch:
            if not isinstance(value, (bool, str)):
                raise UsageError(f"{key} = {_shown(value)}: expected true or false")
            yield name, value if isinstance(value, str) else "on" if value else "off"
        else:
            text = _text(key, value)
            is_file = name == "template" and os.sep in text
            yield name, str(path.parent / os.path.expanduser(text)) if is_file else text


def _variable(name: str, value: object) -> str:
    if "=" in name:
        raise UsageError(f'env: {name!r}: expected the name of a variable, for example env = {{NAME = "VALUE"}}')
    return f"{name}={_text(f'env.{_plain(name)}', value)}"


def _option(key: str, name: str) -> Option:
    """The option ``name`` of sbatch. A ``key`` with dashes may be an option of a newer sbatch."""
    if name == "nodes":
        raise UsageError("[sbatch] nodes: write nodes = 'MIN:MAX' above [sbatch]")
    if name in COMMAND_LINE_ONLY:
        raise UsageError(f"[sbatch] {key}: belongs on the command line")
    if name in SBATCH or is_for_containers(name) or key.startswith("--"):
        return named(name)
    if name in ELASTIC:
        raise UsageError(f"[sbatch] {key}: it is elastic-sbatch's own option: write it above [sbatch]")
    long = next((f", did you mean {option.name}?" for option in SBATCH.values() if option.letter == key), "")
    raise UsageError(
        f"[sbatch] {key}: unknown option of sbatch{long or _closest(name, SBATCH)}; "
        f"an option that only a newer sbatch knows is written with its dashes: '--{name}' = ..."
    )


def _sbatch_value(key: str, option: Option, value: object) -> str | None:
    if value is True and option.value != "=":
        return None
    if not option.value:
        raise UsageError(f"{key} = {_shown(value)}: expected true or false")
    return _text(key, value)


def _text(key: str, value: object) -> str:
    """A string or a number as it would be typed."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    example = ""
    if isinstance(value, (time, date)):
        example = f', for example "{value}": without quotes TOML reads a time or a date'
    elif isinstance(value, list) and value:
        example = f", for example {','.join(map(str, value))!r}"
    raise UsageError(f"{key} = {_shown(value)}: expected a string or a number{example}")


def _shown(value: object) -> str:
    """``value`` about as TOML writes it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (time, date)) else repr(value)


def _closest(name: str, known: Collection[str]) -> str:
    if meant := did_you_mean(name.lower(), known):
        return f", {meant}"
    return f", expected one of {', '.join(known)}" if len(known) < 50 else ""
