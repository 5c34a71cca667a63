"""The interpreter for the workers of the in-place tests: torch 2.14 is the first version that supports training in
place.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

_MADE = Path(__file__).parents[1] / ".venv-2.14"


def _find() -> tuple[str, str]:
    """The interpreter's path, or "" and the reason why there is none."""
    named = os.environ.get("ELASTIC_HPC_TORCH_214")
    if named == "off":
        return "", "ELASTIC_HPC_TORCH_214=off"
    if named:
        return named, ""
    if (_MADE / ".setup-live").exists():  # bin/setup-venv has finished
        return str(_MADE / "bin" / "python"), ""
    major, minor = version("torch").split(".")[:2]
    if (int(major), int(minor)) >= (2, 14):
        return sys.executable, ""
    return "", "no torch 2.14: type  bin/setup-venv live 2.14.1"


TORCH_214, _WHY_NOT = _find()
IN_PLACE = pytest.mark.skipif(not TORCH_214, reason=_WHY_NOT)
"""For a test whose workers run on ``TORCH_214``."""
