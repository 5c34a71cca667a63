"""The help of all commands, in one layout."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from elastic_hpc.options.table import ElasticOption

PLAIN: dict[str, Any] = {"color": False} if sys.version_info >= (3, 14) else {}
"""Settings of a parser: no colors, because an error of one line contains the usage."""

EXIT_CODES = "Exit codes: 0 success; 1 failure; 2 the request was refused; 130 Ctrl-C."
"""Of all commands. Some add their exceptions."""

_WIDEST = 120
_WIDTH = 116
"""If a line of a help text has room for the next word within this width, it ends there on purpose."""


class Layout(argparse.HelpFormatter):
    """argparse's layout, with texts that fit the terminal, a short usage, and values shown once."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, _WIDEST) - 2, **settings)

    def _fill_text(self, text: str, width: int, *_: Any) -> str:
        parts = [lines(part) for part in text.strip("\n").split("\n\n")]
        return "\n\n".join("\n".join(shown for line in part for shown in _wrapped(line, width)) for part in parts)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(" ".join(text.split()), width)

    def _format_usage(self, usage: Any, actions: Iterable[argparse.Action], *others: Any) -> str:
        arguments = [self._format_args(action, action.dest) for action in actions if not action.option_strings]
        return super()._format_usage(usage or " ".join(["%(prog)s", "[options]", *arguments]), [], *others)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.REMAINDER:
            return f"[{action.metavar}...]"
        return super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        shown = ", ".join(sorted(action.option_strings, key=len))
        return f"{shown}[={action.metavar}]" if action.nargs == "?" else f"{shown} {value}".rstrip()


def _wrapped(line: str, width: int) -> list[str]:
    return [line] if line.startswith("  ") else wrap(line, width, break_on_hyphens=False, break_long_words=False)


def lines(part: str) -> list[str]:
    """The lines of a paragraph, joined except where they end on purpose or are indented."""
    found: list[str] = []
    before = ""
    for line in part.splitlines():
        is_text = found and not before.startswith("  ") and not line.startswith("  ")
        if is_text and len(before) + 1 + len(line.split()[0]) >= _WIDTH:
            found[-1] += f" {line}"
        else:
            found.append(line)
        before = line
    return found


def manual(
    usage: str, description: str, groups: Mapping[str, Sequence[ElasticOption]], notes: str
) -> argparse.ArgumentParser:
    """The help of a command whose options are in tables. The result does not parse: argparse would not stop at the
    script. ``groups``: the options, by the titles above them.
    """
    shown = argparse.ArgumentParser(
        usage.partition(" ")[0],
        usage,
        description,
        notes,
        formatter_class=Layout,
        add_help=False,
        **PLAIN,
    )
    shown.add_argument("script", metavar="SCRIPT", help="the training script, or with -m the module")
    shown.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    for title, options in groups.items():
        group = shown.add_argument_group(title)
        for option in options:
            value = {"metavar": option.metavar, "nargs": "?" if option.is_switch else None}
            how: dict[str, Any] = value if option.metavar else {"action": "store_true"}
            group.add_argument(*option.flags, help=option.help, **how)
    return shown
