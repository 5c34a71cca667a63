"""A batch script's #SBATCH lines, and which of their options are for the whole job only. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from elastic_hpc.errors import UsageError
from elastic_hpc.options.of_joiners import WHOLE_JOB
from elastic_hpc.options.sbatch import SBATCH, Given, Option, scan
from elastic_hpc.options.sbatch_lines import DIRECTIVE, lines, unquoted, words


def _abbreviations() -> Iterator[Option]:
    """Abbreviations that sbatch accepts for options of ``WHOLE_JOB``: prefixes that no other option has."""
    for prefix in sorted({name[:end] for name in WHOLE_JOB for end in range(1, len(name))} - SBATCH.keys()):
        meant = [option for name, option in SBATCH.items() if name.startswith(prefix)]
        if {option.name for option in meant} <= WHOLE_JOB and len({option.value for option in meant}) == 1:
            yield Option(prefix, value=meant[0].value)


_ABBREVIATED = tuple(_abbreviations())
_DROPPED = WHOLE_JOB | {option.name for option in _ABBREVIATED}


@dataclass(frozen=True)
class _Words:
    """A word with an option, or with several short options; and the next word, if it is the option's value."""

    given: tuple[Given, ...]
    text: str
    """The words as in the line, with the space in front."""
    letters: int
    """Where in ``text`` the options' letters begin, if they are letters."""

    def kept(self) -> str:
        """``text`` without the options that are for the whole job only."""
        keep = [option.name not in _DROPPED for option in self.given]
        if all(keep) or not any(keep):
            return self.text if all(keep) else ""
        begin, end = self.letters, self.letters + len(keep)
        letters = "".join(letter for letter, kept in zip(self.text[begin:end], keep, strict=True) if kept)
        return self.text[:begin] + letters + (self.text[end:] if keep[-1] else "")  # only the last option has a value


def joiner_script(script: bytes) -> bytes:
    """``script`` without the directives that are for the whole job only; every other byte stays.

    A directive that cannot be parsed stays too.
    """
    kept_lines = []
    for line, groups in _lines(script):
        kept = "".join(group.kept() for group in groups)
        if not groups:
            kept_lines.append(line)
        elif kept:
            kept_lines.append(DIRECTIVE + kept + line[len(DIRECTIVE) + sum(len(group.text) for group in groups) :])
    return "".join(kept_lines).encode("latin-1")


def given(script: bytes, name: str) -> str | None:
    """The last value in the directives for ``name``, one of the options that ``joiner_script`` drops.

    None if no directive has that option.
    """
    found = [option for _, groups in _lines(script) for group in groups for option in group.given]
    meant = (option for option in reversed(found) if option.name in _DROPPED and name.startswith(option.name))
    return next((option.value for option in meant), None)


def _lines(script: bytes) -> Iterator[tuple[str, list[_Words]]]:
    """The lines; a directive comes with its options."""
    for line, directive in lines(script):
        try:
            yield line, _parsed(line) if directive else []
        except UsageError:
            yield line, []


def _parsed(line: str) -> list[_Words]:
    groups, left, at = [], words(line), len(DIRECTIVE)
    while left:
        first = last = left.pop(0)
        try:
            group, rest = scan([unquoted(first[1])], _ABBREVIATED)
        except UsageError:
            if not left:
                raise
            last = left.pop(0)
            group, rest = scan([unquoted(first[1]), unquoted(last[1])], _ABBREVIATED)
        plain = re.match(r"-\w+", first[1], re.ASCII)  # short options, the last perhaps with its value
        if not group or rest or (len(group) > 1 and (plain is None or plain.end() <= len(group))):
            raise UsageError(f"{line!r}: not only options")
        groups.append(_Words(tuple(group), line[at : last.end()], first.start(1) - at + 1))
        at = last.end()
    return groups
