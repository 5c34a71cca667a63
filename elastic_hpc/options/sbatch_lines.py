"""The #SBATCH lines at the head of a script, as sbatch reads them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from elastic_hpc.errors import UsageError
from elastic_hpc.options.of_joiners import are_elsewhere
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, SBATCH, Given, scan
from elastic_hpc.options.table import ELASTIC

DIRECTIVE = "#SBATCH"
FOR_JOINERS = "#GROW"
"""Begins the lines with options for joiners, which are comments to sbatch."""
# sbatch's own quoting: a backslash counts within both kinds of quotes, and # begins a comment within a word too.
_QUOTED = r"""\\(.)|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'"""
_WORD = re.compile(rf"""\s*((?:{_QUOTED}|[^\s#"'\\])+)(?=[\s#]|$)""", re.ASCII)
_REST = re.compile(r"\s*(?:#.*)?$", re.ASCII)


def lines(script: bytes, mark: str = DIRECTIVE) -> Iterator[tuple[str, bool]]:
    """Each line of ``script``, with a character for each byte, and whether it is a directive, which begins with
    ``mark``. sbatch reads directives up to the first command.
    """
    head = True
    for line in re.findall(r"[^\n]*\n|[^\n]+$", script.decode("latin-1")):
        directive = head and line.startswith(mark)
        head = head and (directive or _REST.match(line) is not None)
        yield line, directive


def words(line: str, mark: str = DIRECTIVE) -> list[re.Match[str]]:
    """The words of a directive, with their quotes: group 1 of each match, which includes the space before."""
    found, at = [], len(mark)
    while not _REST.match(line, at):
        word = _WORD.match(line, at)
        if word is None:
            raise UsageError(f"{line.strip()!r}: expected quotes in pairs")
        found.append(word)
        at = word.end()
    return found


def unquoted(word: str) -> str:
    """``word`` without its quotes and backslashes."""
    return re.sub(_QUOTED, lambda part: part[1] or re.sub(r"\\(.)", r"\1", part[0][1:-1]), word)


def options(script: bytes, name: str, mark: str = DIRECTIVE) -> list[Given]:
    """The options in the lines of ``script`` that begin with ``mark``, by their full names, with ``name`` and the
    number of the line as source. Raises UsageError for a line that sbatch would not understand.
    """
    found: list[Given] = []
    for number, (line, directive) in enumerate(lines(script, mark), 1):
        if not directive:
            continue
        place = f"{name} line {number}"
        try:
            given, rest = scan([unquoted(word[1]) for word in words(line, mark)], ())
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from None
        if rest:
            raise UsageError(f"{place}: {line.strip()!r}: expected options of sbatch, not {rest[0]!r}")
        for option in given:
            text = option.value and option.value.encode("latin-1").decode(errors="surrogateescape")
            found.append(replace(option, value=text, source=place))
    return found


def grows_elsewhere(script: bytes) -> bool:
    """Whether the joiners of the job with this batch ``script`` run under another account or QOS, or in another
    partition. Raises UsageError.
    """
    return are_elsewhere(options(script, "script.sbatch", FOR_JOINERS))


def directives_of_python(script: bytes, name: str) -> list[Given]:
    """``options`` of a Python script. Raises UsageError for an option that sbatch does not know, or knows only on its
    command line.
    """
    given = options(script, name)
    for option in given:
        if option.name.replace("_", "-") in ELASTIC and option.name not in SBATCH:
            raise UsageError(
                f"{option.source}: {option.flag}: an option of elastic-sbatch; "
                "expected on its command line, or in elastic_hpc.toml"
            )
        if option.name in COMMAND_LINE_ONLY:
            raise UsageError(f"{option.source}: {option.flag}: belongs on the command line")
    return given
