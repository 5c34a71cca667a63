"""The code of a job: what git says about it, which every submission keeps for the run directory, and with --snapshot a
copy of the files that git tracks. Runs git, reads and writes files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_hpc.errors import UsageError

_MAX_DIFF = 10_000_000  # bytes
_SECONDS = 5.0  # for the record, which must not delay a submission
_LIST_SECONDS = 60.0  # for the list of files, which a snapshot needs
LIST = "code.files.json"
"""The file that lists the copied files: what the job adds to the copy, or changes in it, belongs to the job."""

Listed = tuple[str, int, int]
"""A file's path in the copy, its size, and when it was modified, in whole seconds, as some file systems store."""


def listed(name: str, found: os.stat_result) -> Listed:
    return name, found.st_size, int(found.st_mtime)


@dataclass(frozen=True)
class WorkTree:
    """A git work tree, and where in it the job's working directory is."""

    top: str  # absolute, without symbolic links
    folder: str  # relative to it; "." for the top itself

    @classmethod
    def around(cls, directory: str) -> WorkTree | None:
        """The work tree that contains ``directory``; None without a work tree, or if git does not answer."""
        output = _git(directory, "rev-parse", "--show-toplevel", seconds=_SECONDS)
        top = os.path.realpath(os.fsdecode(output).removesuffix("\n")) if output else ""
        return cls(top, os.path.relpath(os.path.realpath(directory), top)) if top else None

    @property
    def directory(self) -> str:
        return os.path.normpath(os.path.join(self.top, self.folder))

    @property
    def in_run_dir(self) -> str:
        """The working directory in the copy, relative to the run directory."""
        return os.path.normpath(os.path.join("code", self.folder))

    def script(self, script: str) -> str:
        """``script`` relative to the working directory: in the copy, this path leads to the script's copy. Raises
        UsageError if git does not track the script.
        """
        folder, name = os.path.split(os.path.join(self.directory, script))
        path = os.path.join(os.path.realpath(folder), name)
        inside = os.path.relpath(path, self.top)
        if inside not in self.files():
            raise UsageError(
                f"script {script!r} with --snapshot: git does not track it in {self.top}, and a snapshot has only what "
                f"git tracks; type: git add {script}"
            )
        return os.path.relpath(path, self.directory)

    def files(self) -> list[str]:
        """What git tracks, submodules included, relative to the top. Raises UsageError if git does not say."""
        output = _git(self.top, "ls-files", "-z", "--recurse-submodules", seconds=_LIST_SECONDS)
        if output is None:
            raise UsageError(f"--snapshot: git does not list the files of {self.top}; see: git ls-files")
        return list(dict.fromkeys(filter(None, os.fsdecode(output).split("\0"))))  # git lists a conflict three times


def put_aside(code: WorkTree, staged: Path, *, snapshot: bool) -> None:
    """Make ``staged`` with ``code.json`` and ``code.diff`` and, with ``snapshot``, the files, in ``code/``. Raises
    UsageError if the copy cannot be made. Without ``snapshot``, a record that cannot be made is left out.
    """
    try:
        staged.mkdir(mode=0o700)
        _write_record(code, staged, snapshot=snapshot)
        if snapshot:
            copied = _copy(code, staged / "code")
            (staged / LIST).write_text(json.dumps(copied))
    except OSError as error:
        discard(staged)
        if snapshot:
            raise UsageError(f"--snapshot: {error.filename or staged}: {error.strerror}") from None
    except BaseException:
        discard(staged)
        raise


def discard(staged: Path) -> None:
    """Remove ``staged``, which no job will use."""
    shutil.rmtree(staged, ignore_errors=True)


def _copy(code: WorkTree, to: Path) -> list[Listed]:
    """Copy the files as they are in the work tree, except for deleted files and for submodules that were not fetched.
    Returns what is in the copy.
    """
    copied = []
    (to / code.folder).mkdir(parents=True)
    for name in code.files():
        source, copy = os.path.join(code.top, name), os.path.join(to, name)
        if os.path.islink(source) or os.path.isfile(source):
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
            copied.append(listed(name, os.lstat(copy)))
    return copied


def _write_record(code: WorkTree, to: Path, *, snapshot: bool) -> None:
    end = time.monotonic() + _SECONDS
    diff, complete = _diff(code.top, end - time.monotonic())
    facts: dict[str, Any] = {
        "time": time.time(),
        "folder": code.directory,
        "revision": _line(code.top, "rev-parse", "--verify", "HEAD", seconds=end - time.monotonic()),
        "branch": _line(code.top, "symbolic-ref", "--short", "HEAD", seconds=end - time.monotonic()),
        "dirty": bool(diff) if complete or diff else None,
        "diff_complete": complete,
        "snapshot": snapshot,
    }
    for name, content in ("code.diff", diff), ("code.json", json.dumps(facts, indent=1).encode() + b"\n"):
        with os.fdopen(os.open(to / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)


def _diff(top: str, seconds: float) -> tuple[bytes, bool]:
    """The diff between the revision and tracked files, up to the limits of size and time; whether it is complete."""
    arguments = ("diff", "--binary", "--submodule=diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--")
    try:
        process = subprocess.Popen(
            ["git", "-C", top, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environ()
        )
    except OSError:
        return b"", False
    with process:
        assert process.stdout
        timer = threading.Timer(max(0.0, seconds), process.kill)
        timer.start()
        diff = process.stdout.read(_MAX_DIFF + 1)
        if len(diff) > _MAX_DIFF:
            process.kill()
        code = process.wait()
        timer.cancel()
    return diff[:_MAX_DIFF], code == 0


def _line(directory: str, *arguments: str, seconds: float) -> str | None:
    output = _git(directory, *arguments, seconds=seconds)
    return output.decode(errors="replace").strip() or None if output else None


def _git(directory: str, *arguments: str, seconds: float) -> bytes | None:
    """What git prints; None if git fails, is missing, or is too slow."""
    try:
        done = subprocess.run(
            ["git", "-C", directory, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environ(),
            timeout=max(0.1, seconds),
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _environ() -> dict[str, str]:
    """An environment in which git takes no locks: other users of the work tree may hold them or wait for them."""
    return {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
