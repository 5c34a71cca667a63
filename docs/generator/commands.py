"""What the commands accept, read from their parsers and tables: the one source of pages, man pages and completion."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby

from elastic_hpc.cli import hpc, sbatch, srun
from elastic_hpc.cli.manual import lines
from elastic_hpc.options.of_joiners import COMMON
from elastic_hpc.options.sbatch import REFUSED, SBATCH


@dataclass(frozen=True)
class OptionHelp:
    """``flags``: as typed, ``-N``, ``--nodes``. ``value``: the placeholder of the value, empty without a value."""

    flags: tuple[str, ...]
    value: str
    help: str
    is_switch: bool = False
    """Whether the value is optional, and is given after ``=``."""

    @property
    def usage(self) -> str:
        *short, long = self.flags
        shown = f"{long}[={self.value}]" if self.is_switch else f"{long} {self.value}".rstrip()
        return ", ".join([*short, shown])


@dataclass(frozen=True)
class Command:
    """``description`` and ``end``: text in paragraphs; indented lines are shown as they are."""

    name: str
    usage: str
    summary: str
    description: str = ""
    end: str = ""
    arguments: tuple[tuple[str, str], ...] = ()
    groups: tuple[tuple[str, tuple[OptionHelp, ...]], ...] = ()
    subcommands: tuple[Command, ...] = ()
    passed_through: tuple[OptionHelp, ...] = field(default=(), repr=False)
    """Options of another command that this command also accepts; that command's manual describes them."""

    @property
    def options(self) -> tuple[OptionHelp, ...]:
        return tuple(option for _, options in self.groups for option in options)


@dataclass(frozen=True)
class Block:
    """A part of a text: a paragraph, whose line breaks are kept, or literal lines."""

    lines: tuple[str, ...]
    is_literal: bool = False


def commands() -> tuple[Command, ...]:
    return (_sbatch(), _of_parser(srun.MANUAL), _of_parser(hpc.parser()))


def blocks(text: str) -> list[Block]:
    """The parts of a help text."""
    found: list[Block] = []
    for part in text.strip("\n").split("\n\n"):
        for is_literal, run in groupby(lines(part), key=lambda line: line.startswith("  ")):
            found.append(Block(tuple(line[2 * is_literal :] for line in run), is_literal))
    return found


def _sbatch() -> Command:
    command = _of_parser(sbatch.manual())
    own = {flag for option in command.options for flag in option.flags}
    return replace(command, passed_through=tuple(_passed(own)))


def _passed(own: set[str]) -> Iterable[OptionHelp]:
    for option in SBATCH.values():
        letter = [f"-{option.letter}"] if option.letter else []
        flags = tuple(flag for flag in (*letter, option.flag) if flag not in own)
        if option.flag in flags and option.name not in REFUSED:
            yield OptionHelp(flags, "VALUE" if option.value else "", "", option.value == "[=]")
    yield from (OptionHelp((f"--{name}",), "VALUE", "") for name in COMMON)


def _of_parser(parser: argparse.ArgumentParser, summary: str = "") -> Command:
    formatter = parser._get_formatter()  # noqa: SLF001 - argparse has no other way to look at a parser
    arguments: list[tuple[str, str]] = []
    groups: list[tuple[str, tuple[OptionHelp, ...]]] = []
    subcommands: list[Command] = []
    for group in parser._action_groups:  # noqa: SLF001
        options = []
        for action in group._group_actions:  # noqa: SLF001
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
                helps = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
                subcommands += [_of_parser(action.choices[name], text) for name, text in helps.items()]
            elif action.help == argparse.SUPPRESS:
                continue
            elif action.option_strings:
                is_switch = action.nargs == "?"
                value = str(action.metavar) if is_switch else "" if action.nargs == 0 else _value(action, formatter)
                flags = tuple(sorted(action.option_strings, key=len))
                shown = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
                options.append(OptionHelp(flags, value, shown, is_switch))
            else:
                shown = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
                arguments.append((_several(_value(action, formatter)), shown))
        if options:
            groups.append((group.title or "options", tuple(options)))
    description = parser.description or ""
    return Command(
        parser.prog,
        " ".join(parser.format_usage().removeprefix("usage: ").split()),
        summary or _summary(description),
        description,
        parser.epilog or "",
        tuple(arguments),
        tuple(groups),
        tuple(subcommands),
    )


def _value(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    if action.nargs == argparse.REMAINDER:
        return str(action.metavar)
    default = action.dest.upper() if action.option_strings else action.dest
    return formatter._format_args(action, default)  # noqa: SLF001


def _several(value: str) -> str:
    """``value`` without the mark for repetition: ``JOB ...`` means one or more."""
    return re.sub(r"^(\S+) \[\1 \.\.\.\]$", r"\1 ...", value).strip("[]")


def _summary(description: str) -> str:
    """The first sentence in the form of a man page's NAME line."""
    sentence = description.partition(". ")[0].rstrip(".")
    return sentence[0].lower() + sentence[1:]
