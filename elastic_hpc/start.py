"""How we start our own processes: as a module of an interpreter, which need not be this process's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Python 3.10 has no -P, and the version of another interpreter is unknown: this code has the effect of -P. Python 3.13
# imports modules before it runs the code, even from the working directory; the variable, unknown to 3.10, prevents
# that.
_SAFE = "PYTHONSAFEPATH"
_CODE = (
    f'import os, sys; os.environ.pop("{_SAFE}", None); sys.path = [*filter(None, sys.path)]; '
    'import runpy; runpy.run_module(sys.argv.pop(1), None, "__main__", True)'
)


def module_command(python: str | Sequence[str], module: str, *args: str, unbuffered: bool = False) -> list[str]:
    """``python -m module args``, but without the working directory on the path: Python would import a user's
    ``queue.py`` there instead of the library's, before any code of ours runs. PYTHONPATH stays in effect. ``python``
    may be several words, with options of its own.
    """
    options = ["-u"] if unbuffered else []
    words = [python] if isinstance(python, str) else python
    if words[0] == sys.executable and sys.version_info >= (3, 11):
        return [*words, *options, "-P", "-m", module, *args]
    return ["env", f"{_SAFE}=1", *words, *options, "-c", _CODE, module, *args]
