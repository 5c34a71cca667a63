"""What a command shows on a terminal, or writes to a file or a pipe."""

from __future__ import annotations

import re
import sys

from rich.console import Console, RenderableType

_NO_SCREEN = 10_000
"""Columns of a file or a pipe."""


def console() -> Console:
    """A console that wraps nothing and leaves nothing out where there is no screen."""
    return Console(highlight=False, width=None if Console().is_terminal else _NO_SCREEN)


def show(on: Console, what: RenderableType) -> None:
    """Print ``what``; to a file or a pipe without the blanks that fill a line."""
    with on.capture() as shown:
        on.print(what)
    sys.stdout.write(shown.get() if on.is_terminal else re.sub(" +$", "", shown.get(), flags=re.MULTILINE))
