"""How each of the three commands begins and ends: its streams, its errors, its exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import IO

from elastic_hpc.errors import NO_FOLDER, ElasticError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def run(name: str, work: Callable[[], int]) -> int:
    """The exit code of the command ``name``: what ``work`` returns, 1 or 2 with the message of an ElasticError, 130
    after Ctrl-C, 1 without a message when the reader of the output has gone.

    Characters that the terminal does not have are printed as ``?``.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell: >&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        elif isinstance(written := getattr(sys, stream), io.TextIOWrapper):
            written.reconfigure(errors="replace")
    try:
        code = _code(name, work)
        sys.stdout.flush()  # here, because a failure at the interpreter's end would show a traceback
    except BrokenPipeError:
        _forget(sys.stdout, sys.stderr)
        return 1
    except PermissionError as error:  # on the job of another user
        tell(name, f"{error.filename}: {error.strerror}")
        return 1
    except OSError as error:
        if error.errno == errno.ENOENT and error.filename is None:  # os.getcwd
            tell(name, NO_FOLDER)
            return 2
        if error.errno not in _UNWRITABLE:
            raise
        _forget(sys.stdout, sys.stderr)
        tell(name, f"cannot write: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def tell(name: str, text: str) -> None:
    """Print a line on stderr. If the pipe or the terminal is gone, the work continues."""
    with contextlib.suppress(OSError):
        print(f"{name}: {text}", file=sys.stderr, flush=True)


def end_without_reader() -> None:
    """If the reader of stdout has gone, end a command that waits for news, as a write would."""
    poll = select.poll()
    with contextlib.suppress(io.UnsupportedOperation):  # stdout is no file: another program has called this
        poll.register(sys.stdout, 0)
        if poll.poll(0):
            raise BrokenPipeError


def _code(name: str, work: Callable[[], int]) -> int:
    try:
        return work()
    except ElasticError as error:
        tell(name, str(error))
        return error.exit_code
    except SystemExit as ended:  # argparse: --help, --version, bad input
        return ended.code if isinstance(ended.code, int) else 0


def _forget(*streams: IO[str]) -> None:
    """Discard what is left in the buffers and cannot be written: otherwise Python would exit with 120."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
