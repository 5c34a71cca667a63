"""Makes and checks the folders of run directories, and makes NFS read their content again.

No other user may change these folders, as a job takes its code and its secret from there. The rules are those of sshd
for the folder of a user's keys (StrictModes). Folders further up belong to the site, and are not checked.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import tempfile
from pathlib import Path

from elastic_hpc.errors import ElasticError, UsageError


def make_private(path: Path, *, exist_ok: bool) -> None:
    """Make the folder ``path`` for this user alone, or accept an existing folder that this user owns and no other user
    may write to. Raises OSError, and ElasticError for a folder that is refused.
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
        if _others_write(path):  # the file system copies the mode of the parent
            path.chmod(0o700)
    if _others_write(path):
        todo = f"type: chmod go-w {path}; or choose a file system that keeps modes: --log-dir DIR"
        raise ElasticError(_refusal("run directory", path, path.stat(), todo))


def make_log_dir(folder: str | os.PathLike[str]) -> None:
    """Make the folder of run directories, or accept an existing folder of this user, of root, or of a group. Any user
    who may write to the folder can replace run directories in it, so a world-writable folder is refused unless it is
    sticky, like /tmp. Raises UsageError.
    """
    path = Path(folder).absolute()
    try:
        _make(path)
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(
            f"--log-dir {str(folder)!r}: {error.strerror}; expected a folder that can be written and that all nodes "
            "share"
        ) from error
    everybody = mode & stat.S_IWOTH and not mode & stat.S_ISVTX
    if everybody or not (mode & stat.S_IWGRP or mode & stat.S_ISVTX or _is_ours(path)):
        todo = f"choose a folder of your own, for example: --log-dir {path / _name(os.geteuid())}"
        raise UsageError(_refusal("--log-dir", path, path.stat(), todo))


def look_again(folder: Path) -> None:
    """Make NFS ask the server for the names in ``folder``: for up to a minute, a client believes that a name is missing
    which another node has made meanwhile. Raises OSError if there is no such folder.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        if folder == folder.parent:
            raise
        look_again(folder.parent)
        os.scandir(folder).close()


def replace(path: Path, text: str) -> None:
    """Write the file ``path``, for this user alone: a reader sees the old text or ``text``, whole. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # the disk may be full
        raise


def is_there(path: Path) -> bool:
    """Whether ``path`` exists, even if another node has just made it: see ``look_again``."""
    with contextlib.suppress(OSError):
        look_again(path.parent)
    return path.exists()


def _make(path: Path) -> None:
    """Make ``path`` and missing folders above it, without write permission for all users."""
    if not path.is_dir():
        _make(path.parent)
        path.mkdir(0o775, exist_ok=True)


def _others_write(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_ours(path: Path) -> bool:
    """Whether this user or root owns ``path``. A file server may map owners to other users: then the owner of a file
    that this user makes there is compared.
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
