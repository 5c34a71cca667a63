"""The traceback, or last line, that a process wrote to stderr before it died; ``causes`` interprets it. Pure."""

from __future__ import annotations

import re

READ = 64 * 1024
"""Number of bytes at the end of a process's stderr that are searched for its traceback."""
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
"""Starts of the line above a traceback that did not end this process, but a thread or a child with the same stderr."""
_SYNTAX_ERROR = re.compile(
    r'^  File "[^"\n]*", line \d+\n(?:.*\n){1,4}?(?:Syntax|Indentation|Tab)Error: .*', re.MULTILINE
)  # in the script itself: it has no header
_FATAL = re.compile(r"^Fatal Python error: .*(?:\n.*)*?(?=\n\nExtension modules:|\Z)", re.MULTILINE)  # faulthandler's
_ABORT = re.compile(r"^terminate called after throwing an instance of '(.*)'\n  what\(\):  (.*)", re.MULTILINE)
_NOISE = re.compile(
    r"^(\[rank\d+\]:)?\[[WIEF]\d+ |^[WIEF]\d{4} |^Exception ignored|^\S+:\d+: \w*Warning: |^Exception raised from "
    r"|^frame #\d+: |^terminate called after |^Process \S+:$|^Exception in thread "
)
"""Lines that libraries write while a process ends. Such a line ends the text of an exception, and never counts as the
last line.
"""


def last_line(text: str) -> str:
    """The last line that is not empty and not ``_NOISE``."""
    lines = (line.strip() for line in reversed(_ANSI.sub("", text[-READ:]).splitlines()))
    return next((without_ranks(line)[:500] for line in lines if line and not _NOISE.search(line)), "")


def traceback_of(text: str) -> str | None:
    """The traceback that ended a Python process, from ``text``, its stderr: the last traceback with those it is chained
    to, without torch's ``[rank0]: `` on every line.
    """
    text = _ANSI.sub("", text[-READ:])
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
    if found := _SYNTAX_ERROR.search(without_ranks(text)):
        return found[0]
    return elsewhere


def abort_of(text: str) -> str | None:
    """Type and text of the C++ exception that ended a process, from ``text``, its stderr."""
    aborts = _ABORT.findall(text)
    return ": ".join(dict.fromkeys(aborts[-1])) if aborts else None


def chain_of(text: str) -> list[str]:
    """Type and text of each chained exception in a traceback, in order of time. Returns any other text unchanged."""
    if text.startswith("Fatal Python error: "):
        return [text.split("\n", 1)[0]]
    if not re.match(r"(  \+ Exception Group )?Traceback \(|  File ", text):
        return [text]
    messages = []
    for part in re.split("|".join(rf"\n\n\s*\|?\s*{re.escape(marker)}\n\n" for marker in _CHAIN), text):
        if part.startswith("  + "):
            found = re.findall(r"^ +\| ((?!Traceback \()[^\s|+].*)$", part, re.MULTILINE)
            messages.append("\n".join(found))
        else:
            messages.append(re.split(r"\n(?=\S)", part, maxsplit=1)[-1].strip())
    return messages


def message_of(traceback: str) -> str:
    """Type and text of the exception that ``traceback`` ends with. At most 2000 characters."""
    return chain_of(traceback)[-1][:2000]


def bounded(traceback: str) -> str:
    """At most 8 KiB of ``traceback``: the middle is left out."""
    if len(traceback) <= _KEEP_HEAD + _KEEP_TAIL:
        return traceback
    head, end = traceback[:_KEEP_HEAD], traceback[-_KEEP_TAIL:]
    return f"{head.rpartition(chr(10))[0] or head}\n    [...]\n{end.partition(chr(10))[2] or end}"


def without_ranks(text: str) -> str:
    """``text`` without torch's ``[rank0]: `` at the start of its lines."""
    return _RANK.sub("", text)


def _starts(line: str) -> bool:
    """Whether a traceback starts in ``line``, perhaps after a progress bar, but not an inner traceback of a group."""
    found = _HEADER.search(line)
    return found is not None and line[: found.start()][-1:] not in {" ", "|"}


def _above(lines: list[str], at: int) -> str:
    return next((text for line in reversed(lines[:at]) if (text := without_ranks(line).strip())), "")


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
    if found[0].startswith("[rank"):  # the prefix marks its lines, except empty lines
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
    return without_ranks("\n".join(kept)).rstrip()
