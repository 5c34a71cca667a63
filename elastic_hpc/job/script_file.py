"""Whether the file given as the training script can be Python, by its content, not by its name. Reads the file."""

from __future__ import annotations

import os
import re
import stat
import warnings

from elastic_hpc.errors import UsageError

_HEAD = 1 << 16
_SHELLS = "sh bash rbash dash ash ksh ksh93 mksh zsh csh tcsh fish busybox"
_OTHERS = "perl ruby Rscript julia node lua tclsh awk gawk make php"
_LIKE_SHELL = re.compile(r"(export|set|source|module|conda|echo|cd|ml|srun|torchrun|mpirun|python3?|\.) +(?!=)|\w+=\S")

FROM_BATCH = "elastic-sbatch --from-batch {script} makes an elastic job of a batch script with a torchrun line"
"""What to type instead of a batch script."""


def check_script(script: str, folder: str = ".") -> None:
    """Raise UsageError if ``script``, as seen from ``folder``, is no file that a Python interpreter can run."""
    path = os.path.join(folder, script)
    expected = "expected a Python file that can be read"
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"script {script!r}: Is a directory; {expected}, or -m MODULE for a package")
        if not stat.S_ISREG(mode):
            raise UsageError(f"script {script!r}: no regular file, so that other nodes cannot read it; {expected}")
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UsageError(f"script {script!r}: {error.strerror}; {expected}") from None
    if problem := not_python(head, script):
        raise UsageError(f"script {script!r}: {problem}")


def not_python(head: bytes, script: str) -> str:
    """What kind of file begins with ``head``, and what to do with it; empty if it may be Python."""
    if not head.strip():
        return "the file is empty; expected a Python file"
    if head.startswith(b"PK\3\4") or script.endswith(".pyc"):  # an archive with __main__.py, compiled code
        return ""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text, which Python does not read; save it as UTF-8"
    if head.startswith(b"\x7fELF"):
        return "a compiled program; expected a Python file, or with --no-python a program that each worker runs"
    if b"\0" in head:
        return "binary data; expected a Python file"
    text = head.removeprefix(b"\xef\xbb\xbf").decode("latin-1").replace("\r\n", "\n")
    if text.lstrip().startswith("{") and re.search(r'"(cells|nbformat|worksheets)"\s*:', text):
        return f"a notebook; make a Python file of it: jupyter nbconvert --to script {script}"
    program = interpreter(text)
    if program in _OTHERS.split():
        return f"a script for {program}; expected a Python file"
    if program in _SHELLS.split() and not _is_polyglot(text):
        return f"a script for {program}, not a Python file; {FROM_BATCH.format(script=script)}"
    begins_like_shell = not program and len(head) < _HEAD and _LIKE_SHELL.match(_first_command(text))
    if begins_like_shell and not _compiles(text):
        return f"a shell script, not a Python file; {FROM_BATCH.format(script=script)}"
    return ""


def interpreter(text: str) -> str:
    """Name of the program in the first line, ``#!...``; empty if there is none."""
    if not text.startswith("#!"):
        return ""
    words = text.partition("\n")[0][2:].split()
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if word[0] != "-" and "=" not in word]
    return os.path.basename(words[0]) if words else ""


def _is_polyglot(text: str) -> bool:
    """Whether a shell starts ``text`` with the right Python: the shell's command is a string for Python."""
    return _first_command(text).startswith(("'", '"'))


def _first_command(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and line[0] != "#"), "")


def _compiles(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "script", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
    return True
