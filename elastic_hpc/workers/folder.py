"""The working directory of this process, which all processes that it starts inherit: workers, standbys, Slurm's
commands. When a file server is replaced, or a user recreates the directory, the process is left in a directory in which
nothing can be opened (ESTALE), or that has no path (ENOENT), until the process enters the directory by its path again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading

log = logging.getLogger(__name__)

_TIMEOUT = 3.0
"""Seconds to wait for a file server."""

_remembered = ""


def remember() -> None:
    """Store the path of the working directory for ``renew``. Call this when the process begins."""
    global _remembered  # noqa: PLW0603 - the working directory belongs to the process, too
    with contextlib.suppress(OSError):
        _remembered = os.getcwd()


def renew() -> None:
    """If the working directory is no longer usable, enter the directory with the same path. If the file server does not
    answer within ``_TIMEOUT``, this happens when it answers.
    """
    if _remembered:
        thread = threading.Thread(target=_renew, name="folder", daemon=True)
        thread.start()
        thread.join(_TIMEOUT)


def _renew() -> None:
    try:
        os.stat(".")
        os.getcwd()
    except OSError as gone:
        try:
            os.chdir(_remembered)
        except OSError as error:
            log.warning("the working directory %s: %s", _remembered, error.strerror)
        else:
            log.info("the working directory %s: %s; it was entered again", _remembered, gone.strerror)
