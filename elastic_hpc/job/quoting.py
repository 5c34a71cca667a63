"""Quoting: words for bash, and options for the #SBATCH lines of a batch script. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from elastic_hpc.errors import UsageError

_LINE_LENGTH = 110
_UNPRINTABLE = r"[\x00-\x1f\x7f\udc80-\udcff]"  # the last: a byte that is not UTF-8


class Shell(str):
    """Text that is already shell syntax, such as ``"$run_dir"`` with its quotes: never quoted again."""

    __slots__ = ()


def joined(prefix: str, value: str, suffix: str = "") -> str:
    """``prefix + value + suffix`` as one word; still shell syntax if ``value`` is. Prefix and suffix need no quotes."""
    text = f"{prefix}{value}{suffix}"
    return Shell(text) if isinstance(value, Shell) else text


def quote(word: str) -> str:
    """``word`` as bash reads it back byte for byte, on one line and in valid UTF-8 whatever its bytes."""
    if isinstance(word, Shell):
        return word
    if not re.search(_UNPRINTABLE, word):
        return shlex.quote(word)
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "'": r"\'", "\\": r"\\"}
    escaped = re.sub(rf"{_UNPRINTABLE}|['\\]", lambda char: named.get(char[0]) or rf"\x{ord(char[0]) & 0xFF:02x}", word)
    return f"$'{escaped}'"


def quote_all(words: Sequence[str], indent: int = 2) -> str:
    """``words`` quoted for bash, folded with backslashes into lines of readable length."""
    lines, line = [], ""
    for word in map(quote, words):
        if line and len(line) + 1 + len(word) > _LINE_LENGTH - indent:
            lines.append(line)
            line = ""
        line += f" {word}" if line else word
    return f" \\\n{' ' * indent}".join([*lines, line])


def first_line(text: str) -> str:
    """The first line of ``text``, shortened for a message."""
    line = text.partition("\n")[0]
    return line if len(line) <= 60 else f"{line[:57]}..."


def directive(option: str, value: object = None, reason: str = "", mark: str = "#SBATCH") -> str:
    """A line that begins with ``mark``. sbatch has its own quoting there: double quotes, backslashes, and ``#``
    begins a comment.
    """
    text = option
    if value is not None:
        given = str(value)
        if re.search(r"[\x00-\x1f\x7f]", given):
            raise UsageError(f"{option}={given!r}: expected one line without control characters")
        if not re.fullmatch(r"[\w@%+=:,./^*-]+", given, re.ASCII):
            given = '"' + re.sub(r'(["\\])', r"\\\1", given) + '"'
        text += f"={given}"
    return f"{mark} {text:<32} # {comment(reason)}" if reason else f"{mark} {text}"


def comment(text: str) -> str:
    """``text`` on one line, fit for a comment."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
