"""Why a worker died, found from its exit code and its stderr; the training script need not do anything. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_hpc.environment import instead_of
from elastic_hpc.membership.known import OUT_OF_MEMORY, known_of
from elastic_hpc.membership.tracebacks import (
    abort_of,
    bounded,
    chain_of,
    last_line,
    message_of,
    traceback_of,
    without_ranks,
)

Kind = Literal["exception", "out of memory", "signal", "exit"]

_KILLED_CHILD = re.compile(r"killed by signal: Killed|exited unexpectedly|terminated abruptly")
"""The message of a process whose own child, such as a data loader's worker, was killed."""

_VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b")


@dataclass(frozen=True)
class Cause:
    """Why a worker died. ``message``: one or more lines, type and text of the exception or what else is known."""

    kind: Kind
    message: str
    traceback: str | None
    known: str = ""
    """Name of the cause in the table (``known.KNOWN``); empty if the table does not have the cause."""
    collateral: bool = False


def explain(exitcode: int, stderr: str, *, oom: bool = False, kernel: Sequence[str] = ()) -> Cause:
    """``exitcode``: minus the signal if a signal killed the worker. ``stderr``: the end of its output. ``oom``: memory
    ran out in the meantime (``workers.memory.OomWatch``). ``kernel``: what the kernel of the worker's node logged in
    the meantime.
    """
    traceback = traceback_of(stderr)
    if exitcode == 1 and traceback:
        kind, message = kind_of(exitcode, traceback, oom=oom), message_of(traceback)
        return _cause(kind, message + advice(message, traceback), traceback, chain_of(traceback), kernel)
    if exitcode >= 0:
        last = last_line(stderr)
        message = f"exit code {exitcode}" + (f": {last}{advice(last)}" if last else "")
    else:
        message = f"killed by {_signal_name(-exitcode)}"
        if exitcode == -signal.SIGABRT and traceback and is_collateral(traceback):  # threads abort while Python ends
            return _cause("exception", message_of(traceback), traceback, chain_of(traceback))
        traceback = traceback if traceback and traceback.startswith("Fatal") else None
        if exitcode == -signal.SIGABRT and (thrown := abort_of(stderr)):
            message += f": {thrown}"
    kind = kind_of(exitcode, message, oom=oom)
    if kind == "out of memory":
        message += " (out of memory; request more, for example --mem)"
    return _cause(kind, message[:2000], traceback, [message], kernel)


def _cause(kind: Kind, message: str, traceback: str | None, chain: Sequence[str], kernel: Sequence[str] = ()) -> Cause:
    known = known_of(chain, kernel)
    collateral = known is not None and known.party == "network"
    if known and known.explains:
        said = next(line for line in kernel if known.pattern.match(f"kernel: {line}"))
        message += f" (the kernel's log: {said[:200]})"
    return Cause(kind, message, traceback and bounded(traceback), known.name if known else "", collateral)


def advice(message: str, traceback: str = "") -> str:
    """What to do if the script needs a variable that workers do not have; empty if not. The name of the variable is in
    ``message``, in an exception that was chained before, or in the line of source that raised.
    """
    raised = traceback.rpartition("\n  File ")[2].partition("\n")[2]
    text = "\n".join([message, *chain_of(traceback), raised])
    name, instead = next(((n, other) for n in _VARIABLE.findall(text) if (other := instead_of(n))), ("", ""))
    if not name:
        return ""
    if "environments/slurm.py" in traceback:
        return f" ({name} is hidden from workers: remove SLURMEnvironment from the Trainer's plugins)"
    return f" ({name} is hidden from workers, which Slurm has not launched: use {instead})"


def kind_of(exitcode: int, text: str | None, *, oom: bool = False) -> Kind:
    """``text``: the traceback or message, if any. An uncaught exception ends Python with exit code 1."""
    if exitcode in {-signal.SIGKILL, 128 + signal.SIGKILL} and oom:
        return "out of memory"
    if text and exitcode in {1, -signal.SIGABRT}:
        chain = chain_of(text)
        known = known_of(chain)
        if (known and known.name in OUT_OF_MEMORY) or (oom and _KILLED_CHILD.search("\n".join(chain))):
            return "out of memory"
    if exitcode < 0:
        return "signal"
    return "exception" if exitcode == 1 and text and not text.startswith("exit code") else "exit"


def is_collateral(text: str) -> bool:
    """Whether a message or traceback is the echo of another rank's death."""
    known = known_of(chain_of(text))
    return known is not None and known.party == "network"


def signature(kind: str, message: str, node: str = "") -> str:
    """A text that is the same when a failure is repeated: numbers, addresses, temporary paths and the name of the
    ``node`` are left out.
    """
    if node:
        message = re.sub(rf"(?<![\w-]){re.escape(node)}(?![\w-])", "NODE", message)
    lines = [line for line in without_ranks(message).splitlines() if line.strip()] or [""]
    text = lines[0] if "Original Traceback" not in message else f"{lines[0]} {lines[-1]}"  # a data loader's worker
    text = re.sub(r"(/tmp|/var/tmp|/dev/shm|/scratch)/[^\s'\":,)\]]+", "TMP", text)
    text = re.sub(r"\b0x[0-9a-fA-F]+\b|\b(?=[0-9a-fA-F-]*\d)[0-9a-fA-F]{4,}(-[0-9a-fA-F]{4,})*\b", "#", text)
    text = re.sub(r"\d+", "#", text)
    text = re.sub(r"#(?:[.,:\-_]?#)+", "#", text)
    return f"{kind}: {re.sub(r'# ?([KMGT]i?B|bytes)', '# bytes', text)[:300]}".strip()


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
