"""How a process of ours is started: as a module of an interpreter, which need not be this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Python 3.10 has no -P, and what another interpreter has is not known: this code does the same. Python 3.13 imports
# modules before it runs it, from the working directory too; a variable that 3.10 does not know keeps it from that.
_SAFE = "PYTHONSAFEPATH"
_CODE = (
    f'import os, sys; os.environ.pop("{_SAFE}", None); sys.path = [*filter(None, sys.path)]; '
    'import runpy; runpy.run_module(sys.argv.pop(1), None, "__main__", True)'
)


def module_command(python: str | Sequence[str], module: str, *args: str, unbuffered: bool = False) -> list[str]:
    """``python -m module args``, but without the working directory on the path: a ``queue.py`` of the user's there
    would be taken for the library's, before any code of ours runs. What PYTHONPATH says counts. ``python`` may be
    several words, with options of its own.
    """
    options = ["-u"] if unbuffered else []
    words = [python] if isinstance(python, str) else python
    if words[0] == sys.executable and sys.version_info >= (3, 11):
        return [*words, *options, "-P", "-m", module, *args]
    return ["env", f"{_SAFE}=1", *words, *options, "-c", _CODE, module, *args]
