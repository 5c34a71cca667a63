"""How a process of ours is started: as a module of an interpreter, which need not be this one."""

from __future__ import annotations

import sys

# Python 3.10 has no -P, and what another interpreter has is not known: this code does the same. Python 3.13 imports
# modules before it runs it, from the working directory too; a variable that 3.10 does not know keeps it from that.
_SAFE = "PYTHONSAFEPATH"
_CODE = (
    f'import os, sys; os.environ.pop("{_SAFE}", None); sys.path = [*filter(None, sys.path)]; '
    'import runpy; runpy.run_module(sys.argv.pop(1), None, "__main__", True)'
)


def module_command(python: str, module: str, *args: str, unbuffered: bool = False) -> list[str]:
    """``python -m module args``, but without the working directory on the path: a ``queue.py`` of the user's there
    would be taken for the library's, before any code of ours runs. What PYTHONPATH says counts.
    """
    options = ["-u"] if unbuffered else []
    if python == sys.executable and sys.version_info >= (3, 11):
        return [python, *options, "-P", "-m", module, *args]
    return ["env", f"{_SAFE}=1", python, *options, "-c", _CODE, module, *args]
