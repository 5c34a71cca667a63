"""The working directory of this process, which all processes that it starts inherit: workers, standbys, Slurm's
commands. A file server that was replaced, or a user who makes the directory anew, leaves a process in a directory in
which nothing can be opened (ESTALE), or that has no path (ENOENT), until the process enters it by its path again.
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
    """The path of the working directory, for ``renew``; to be called when this process begins."""
    global _remembered  # noqa: PLW0603 - the working directory belongs to the process, too
    with contextlib.suppress(OSError):
        _remembered = os.getcwd()


def renew() -> None:
    """If the working directory is of no use any more, enter that of the same path. If the file server does not answer
    in ``_TIMEOUT``, this is done when it answers.
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
