"""Compiled templates, kept in the user's cache folder: compiling them takes longer than the rest of a submission.

The folder is ``$XDG_CACHE_HOME/elastic_hpc``, by default in ``~/.cache``. It contains Python code, so it must belong to
this user alone. Without the folder, templates are compiled each time. Reads and writes files.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import jinja2
from jinja2.bccache import Bucket

from elastic_hpc import __version__
from elastic_hpc.errors import ElasticError
from elastic_hpc.record.folders import make_private


class _Cache(jinja2.FileSystemBytecodeCache):
    def load_bytecode(self, bucket: Bucket) -> None:
        try:
            super().load_bytecode(bucket)
        except Exception:  # noqa: BLE001 - whatever pickle and marshal raise for an incomplete file
            bucket.reset()

    def dump_bytecode(self, bucket: Bucket) -> None:
        with contextlib.suppress(OSError):  # the disk is full, or the quota used up
            super().dump_bytecode(bucket)


def cache() -> jinja2.BytecodeCache | None:
    """The cache; None if its folder cannot be made, or is not private."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(given if os.path.isabs(given) else "~/.cache").expanduser()
        caches.mkdir(mode=0o700, exist_ok=True)
        folder = caches / "elastic_hpc"
        make_private(folder, exist_ok=True)
    except (OSError, ElasticError, RuntimeError):  # RuntimeError: there is no home
        return None
    # the code of a template also depends on our functions, some of which jinja2 calls when it compiles
    return _Cache(str(folder), f"%s-{jinja2.__version__}-{__version__}-{sys.implementation.cache_tag}")
