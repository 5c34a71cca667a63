"""Why a worker died, read from its exit code and its stderr: nothing is asked of the training script."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["exception", "out of memory", "signal", "exit"]

_READ = 64 * 1024
_KEEP_HEAD, _KEEP_TAIL = 3 * 1024, 5 * 1024

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RANK = re.compile(r"^\[rank\d+\]: ", re.MULTILINE)  # torch's, on every line of a traceback once there is a world
_HEADER = re.compile(r"(?:\[rank\d+\]: )?(?:  \+ Exception Group )?(?<!Original )Traceback \(most recent call last\):$")
_FRAME = re.compile(r'((?:\[rank\d+\]: )?)  File ".*", line \d+, in ')
_CHAIN = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_IGNORED = ("Exception ignored", "--- Logging error ---")
_ELSEWHERE = ("Exception in thread ", "Process ")
"""What stands above a traceback that did not end this process: a thread's, or that of a child on the same stderr."""
_SYNTAX_ERROR = re.compile(
    r'^  File "[^"\n]*", line \d+\n(?:.*\n){1,4}?(?:Syntax|Indentation|Tab)Error: .*', re.MULTILINE
)  # in the script itself: it has no header
_FATAL = re.compile(r"^Fatal Python error: .*(?:\n.*)*?(?=\n\nExtension modules:|\Z)", re.MULTILINE)  # faulthandler's
_ABORT = re.compile(r"^terminate called after throwing an instance of '(.*)'\n  what\(\):  (.*)", re.MULTILINE)
_NOISE = re.compile(
    r"^(\[rank\d+\]:)?\[[WIEF]\d+ |^[WIEF]\d{4} |^Exception ignored|^\S+:\d+: \w*Warning: |^Exception raised from "
    r"|^frame #\d+: |^terminate called after |^Process \S+:$|^Exception in thread "
)
"""Lines that libraries write while a process goes down; they end an exception's text and are no last word."""

_OUT_OF_MEMORY = re.compile(
    r"\b_?(Array)?MemoryError\b|\bOutOfMemoryError\b|(CUDA|HIP|XPU) out of memory|CUDA error: out of memory"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc"
)
_KILLED_CHILD = re.compile(r"killed by signal: Killed|exited unexpectedly|terminated abruptly")
"""What a process says when a child of its own, such as a data loader's worker, was killed."""

_LOST_PEER = re.compile(
    # gloo, all versions: pair.cc, buffer.cc, unbound_buffer.cc
    r"gloo/transport/\S+\] .*(closed by peer|Read error|Write error|reset by peer|Broken pipe|[Tt]imed out|[Tt]imeout"
    r"|Socket closed|refused)|Gloo connectFullMesh failed|monitoredBarrier"
    # the store
    r"|client socket has (timed out|failed to connect)|wait timeout after \d+ ?ms|seconds waiting for clients"
    r"|Failed to (recv|send), |Did the remote server shutdown or crash|\"should dump\" flag on TCPStore"
    r"|^(torch\.distributed\.\w+|RuntimeError): (Connection (reset by peer|refused|timed out|was likely closed)"
    r"|Broken pipe|Socket Timeout|No route to host)"
    # NCCL and RCCL
    r"|remote process exited|ncclRemoteError|ncclSystemError|unhandled system error"
    r"|NCCL communicator was aborted|[Ww]atchdog caught collective operation timeout"
    r"|dump signal from another rank|NCCL (operations have failed or timed out)",
    re.MULTILINE,
)
_OWN_FAULT = re.compile(
    r"CUDA error|illegal memory access|device-side assert|No space left on device|no socket interface found"
    r"|Address already in use|EADDRINUSE|invalid usage"
)


class OomWatch:
    """Whether the kernel's out-of-memory killer took a process of this one's cgroup since the watch was made.

    Where the cgroup has no such counter, that of the whole machine is asked.
    """

    def __init__(self) -> None:
        self._before = _oom_kills()

    def happened(self) -> bool:
        return any(count > self._before.get(path, count) for path, count in _oom_kills().items())


@dataclass(frozen=True)
class Cause:
    """Why a worker died. ``message``: type and text of the exception, else what is known; may have several lines."""

    kind: Kind
    message: str
    traceback: str | None
    collateral: bool = False


def explain(exitcode: int, stderr: str, *, oom: bool = False) -> Cause:
    """``exitcode`` is minus the signal if one killed the worker, ``stderr`` the ``tail`` of its output, ``oom`` what
    ``OomWatch`` saw.
    """
    traceback = _find(stderr)
    if exitcode == 1 and traceback:
        kind = kind_of(exitcode, traceback, oom=oom)
        return Cause(kind, message_of(traceback), _bounded(traceback), is_collateral(traceback))
    if exitcode >= 0:
        last = last_line(stderr)
        message = f"exit code {exitcode}" + (f": {last}" if last else "")
    else:
        message = f"killed by {_signal_name(-exitcode)}"
        if exitcode == -signal.SIGABRT and traceback and is_collateral(traceback):  # threads abort while Python ends
            return Cause("exception", message_of(traceback), _bounded(traceback), collateral=True)
        traceback = traceback if traceback and traceback.startswith("Fatal") else None
        if exitcode == -signal.SIGABRT and (aborts := _ABORT.findall(stderr)):
            message += ": " + ": ".join(dict.fromkeys(aborts[-1]))
    kind = kind_of(exitcode, message, oom=oom)
    if kind == "out of memory":
        message += " (out of memory; ask for more, for example --mem)"
    return Cause(kind, message[:2000], traceback and _bounded(traceback), is_collateral(message))


def kind_of(exitcode: int, text: str | None, *, oom: bool = False) -> Kind:
    """``text``: the traceback or message, if any. An exception that nobody catches ends Python with exit code 1."""
    if exitcode in {-signal.SIGKILL, 128 + signal.SIGKILL} and oom:
        return "out of memory"
    if text and exitcode in {1, -signal.SIGABRT}:
        said = "\n".join(_messages(text))
        if _OUT_OF_MEMORY.search(said) or (oom and _KILLED_CHILD.search(said)):
            return "out of memory"
    if exitcode < 0:
        return "signal"
    return "exception" if exitcode == 1 and text and not text.startswith("exit code") else "exit"


def is_collateral(text: str) -> bool:
    """Whether a message or traceback is the echo of another rank's death. Of chained exceptions the first one counts:
    what comes after it may be a collective in the cleanup.
    """
    first = _messages(text)[0]
    return bool(_LOST_PEER.search(first)) and not _OWN_FAULT.search(first)


def signature(kind: str, message: str) -> str:
    """The same for the same failure met again: without numbers, addresses, host names' digits and temporary paths."""
    lines = [line for line in _RANK.sub("", message).splitlines() if line.strip()] or [""]
    text = lines[0] if "Original Traceback" not in message else f"{lines[0]} {lines[-1]}"  # a data loader's worker
    text = re.sub(r"(/tmp|/var/tmp|/dev/shm|/scratch)/[^\s'\":,)\]]+", "TMP", text)
    text = re.sub(r"\b0x[0-9a-fA-F]+\b|\b(?=[0-9a-fA-F-]*\d)[0-9a-fA-F]{4,}(-[0-9a-fA-F]{4,})*\b", "#", text)
    text = re.sub(r"\d+", "#", text)
    text = re.sub(r"#(?:[.,:\-_]?#)+", "#", text)
    return f"{kind}: {re.sub(r'# ?([KMGT]i?B|bytes)', '# bytes', text)[:300]}".strip()


def tail(path: str | os.PathLike[str]) -> str:
    """The last 64 KiB of a file; empty if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _READ))
        return file.read(_READ).decode(errors="replace")
    return ""


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = (line.strip() for line in reversed(_ANSI.sub("", text[-_READ:]).splitlines()))
    return next((_RANK.sub("", line)[:500] for line in lines if line and not _NOISE.search(line)), "")


def traceback_of(text: str) -> str | None:
    """The traceback that ended a Python process, among what it wrote to stderr: the last one, with those it is chained
    to, without torch's ``[rank0]: `` on every line. At most 8 KiB, the middle is left out.
    """
    found = _find(text)
    return found and _bounded(found)


def message_of(traceback: str) -> str:
    """Type and text of the exception that ``traceback`` ends with. At most 2000 characters."""
    return _messages(traceback)[-1][:2000]


def _find(text: str) -> str | None:
    text = _ANSI.sub("", text[-_READ:])
    if fatal := _FATAL.search(text):
        return fatal[0]
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    if frame := next((found for line in lines[1:4] if (found := _FRAME.match(line))), None):  # its head is out of reach
        lines[0] = f"{frame[1]}Traceback (most recent call last):"
    elsewhere = None
    for at in range(len(lines) - 1, -1, -1):
        if not _starts(lines[at]):
            continue
        first = _chain_start(lines, at)
        above = _above(lines, first)
        if above.startswith(_ELSEWHERE):
            elsewhere = elsewhere or _cut(lines, first, at)
        elif not above.startswith(_IGNORED):
            return _cut(lines, first, at)
    if found := _SYNTAX_ERROR.search(_RANK.sub("", text)):
        return found[0]
    return elsewhere


def _starts(line: str) -> bool:
    """Whether a traceback starts in ``line``, perhaps behind a progress bar, and no inner one of a group."""
    found = _HEADER.search(line)
    return found is not None and line[: found.start()][-1:] not in {" ", "|"}


def _above(lines: list[str], at: int) -> str:
    return next((said for line in reversed(lines[:at]) if (said := _RANK.sub("", line).strip())), "")


def _chain_start(lines: list[str], at: int) -> int:
    """First line of the chain whose last traceback starts at line ``at``."""
    while _above(lines, at).strip("| ") in _CHAIN:
        before = next((i for i in range(at - 1, -1, -1) if _starts(lines[i])), None)
        if before is None:
            break
        at = before
    return at


def _cut(lines: list[str], first: int, last: int) -> str:
    """Lines ``first`` to the end of the traceback that starts at line ``last``."""
    found = _HEADER.search(lines[last])
    assert found
    end = last + 1
    if found[0].startswith("[rank"):  # the prefix says what belongs to it; torch leaves empty lines without
        while _RANK.match("".join(lines[end : end + 1]) or "".join(lines[end + 1 : end + 2])):
            end += 1
    else:
        while end < len(lines) and lines[end].startswith((" ", "\t")):  # the frames, or the whole of a group
            end += 1
        if "Exception Group" not in found[0]:
            end += 1  # the exception; further lines of its text, and its notes, follow
            while end < len(lines) and not _NOISE.search(lines[end]):
                end += 1
    kept = [line[header.start() :] if (header := _HEADER.search(line)) else line for line in lines[first:end]]
    return _RANK.sub("", "\n".join(kept)).rstrip()


def _messages(text: str) -> list[str]:
    """What each of the chained exceptions in a traceback says, first one first; a mere message is its own."""
    if text.startswith("Fatal Python error: "):
        return [text.split("\n", 1)[0]]
    if not re.match(r"(  \+ Exception Group )?Traceback \(|  File ", text):
        return [text]
    said = []
    for part in re.split("|".join(rf"\n\n\s*\|?\s*{re.escape(marker)}\n\n" for marker in _CHAIN), text):
        if part.startswith("  + "):
            found = re.findall(r"^ +\| ((?!Traceback \()[^\s|+].*)$", part, re.MULTILINE)
            said.append("\n".join(found))
        else:
            said.append(re.split(r"\n(?=\S)", part, maxsplit=1)[-1].strip())
    return said


def _bounded(text: str) -> str:
    if len(text) <= _KEEP_HEAD + _KEEP_TAIL:
        return text
    head, end = text[:_KEEP_HEAD], text[-_KEEP_TAIL:]
    return f"{head.rpartition(chr(10))[0] or head}\n    [...]\n{end.partition(chr(10))[2] or end}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _oom_kills() -> dict[str, int]:
    """How many processes the kernel has killed for lack of memory, by the file that says so."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for folder, name in _cgroups():
            if (count := _count(folder / name)) is not None:
                found[str(folder / name)] = count
    if not found and (count := _count(Path("/proc/vmstat"))) is not None:
        found["/proc/vmstat"] = count
    return found


def _cgroups() -> list[tuple[Path, str]]:
    """Folder of this process's memory cgroup, version 1 or 2, and the file in it that has the counter."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mountpoint = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2" and "" in own:
            path, name = own[""], "memory.events"
        elif kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            path, name = own["memory"], "memory.oom_control"
        else:
            continue
        top = Path(mountpoint)
        folder = top / os.path.relpath(path, root) if os.path.commonpath((path, root)) == root else top
        while folder != top and not (folder / name).exists():  # a cgroup without the controller is its parent's
            folder = folder.parent
        found.append((folder, name))
    return found


def _count(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None
