"""The folders of run directories, which no stranger may change: a job takes its code and its secret from there.

What sshd asks of the folder of a user's keys (StrictModes) is asked of these folders. Folders above them are the
site's, and are not examined.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from pathlib import Path

from elastic_hpc.errors import ElasticError, UsageError


def make_private(path: Path, *, exist_ok: bool) -> None:
    """Make the folder ``path`` for this user alone, or accept the one that is there if it is this user's and no other
    user may write to it. Raises OSError, and ElasticError for a folder that is refused.
    """
    _make(path.parent)
    try:
        path.mkdir(0o700)
    except FileExistsError:
        if not exist_ok:
            raise
        if path.is_symlink() and path.lstat().st_uid not in {os.geteuid(), 0}:
            raise ElasticError(_refusal("run directory", path, path.lstat(), "remove that link")) from None
        if not _is_ours(path):
            todo = "choose another: --log-dir DIR"
            raise ElasticError(_refusal("run directory", path, path.stat(), todo)) from None
    else:
        if _others_write(path):  # the file system has given it the rights of its parent
            path.chmod(0o700)
    if _others_write(path):
        todo = f"type: chmod go-w {path}; or choose a file system that keeps modes: --log-dir DIR"
        raise ElasticError(_refusal("run directory", path, path.stat(), todo))


def make_shared(path: Path) -> None:
    """Make the folder ``path``, or accept the one that is there: this user's, root's, or one that a group shares. Who
    may write to it may replace run directories in it, so a folder to which everybody may write is refused unless it is
    sticky, as /tmp is. Raises OSError, and UsageError for a folder that is refused.
    """
    _make(path)
    mode = path.stat().st_mode
    everybody = mode & stat.S_IWOTH and not mode & stat.S_ISVTX
    if everybody or not (mode & stat.S_IWGRP or mode & stat.S_ISVTX or _is_ours(path)):
        todo = f"choose a folder of your own, for example: --log-dir {path / _name(os.geteuid())}"
        raise UsageError(_refusal("--log-dir", path, path.stat(), todo))


def _make(path: Path) -> None:
    """Make ``path`` and the folders above it that are missing, none of them for everybody to write to."""
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(0o775, exist_ok=True)


def _others_write(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_ours(path: Path) -> bool:
    """Whether this user or root has ``path``. A file server may show other owners than this machine knows, also for
    what this user makes there.
    """
    owner = path.stat().st_uid
    if owner in {os.geteuid(), 0}:
        return True
    try:
        with tempfile.TemporaryFile(dir=path) as probe:
            return os.fstat(probe.fileno()).st_uid == owner
    except OSError:
        return False


def _refusal(what: str, path: Path, found: os.stat_result, todo: str) -> str:
    return (
        f"{what} {path}: owner {_name(found.st_uid)}, mode {stat.S_IMODE(found.st_mode):04o}; expected owner "
        f"{_name(os.geteuid())}, and that no other user may write there (mode 0700); {todo}"
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
