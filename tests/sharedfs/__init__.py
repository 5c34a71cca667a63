"""A shared file system for tests that behaves like NFS: a server, which is a folder, and clients, which are
mounts with caches of their own. A test switches faults on and off at run time, through a file outside the mounts.

``client`` is a mount. It answers the ``operations`` that the kernel requests through ``fuse``, from a ``cache`` or over
a ``link`` to the server, which has the faults. One difference from NFS: locks (``flock``) hold within a node only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of the server, and how long clients use their caches. The defaults are those of nfs(5)."""

    attributes_s: float = 3.0
    """How long a client caches the size and times of a file; opening the file makes the client ask the server."""
    names_s: float = 30.0
    """How long a client caches the names in a folder; listing the folder makes the client ask the server."""
    write_back_s: float = 30.0
    """Delay before a client sends written data to the server; closing or syncing the file sends it immediately."""
    metadata_s: float = 0.0
    """How long a request about names or attributes takes."""
    stopped: bool = False
    """While true, processes that need the server wait in state D."""
    like_fuse: bool = False
    """Takes effect at the mount of a client: waiting processes are in state S, and signals interrupt them, as with any
    FUSE.
    """
    over_quota: bool = False
    """While true, nothing can be created and no file can grow: EDQUOT. A write fails only when its data goes to the
    server.
    """
    epoch: int = 0
    """When this number changes, the server forgets all open files and folders: ESTALE."""

    @staticmethod
    def read(file: Path) -> Behaviour:
        return Behaviour(**json.loads(file.read_text()))


class Server:
    """``folder``: the content of the server. ``path``: where each client mounts it."""

    def __init__(self, folder: Path, path: Path, control: Path) -> None:
        self.folder, self.path = folder, path
        self._control = control
        self._behaviour = Behaviour()
        self._clients: list[tuple[subprocess.Popen[str], list[str]]] = []
        """Each client with the command that unmounts it."""
        self.behave()

    def behave(self, **changes: float) -> None:
        """``behave(stopped=True)``. All other settings stay as they are."""
        self._behaviour = replace(self._behaviour, **changes)
        new = self._control.with_suffix(".new")
        new.write_text(json.dumps(asdict(self._behaviour)))
        new.replace(self._control)

    def mount(self, path: Path | None = None, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Mount one more client at ``path``. ``inside``: the command that enters the namespaces of a node."""
        target = str(path or self.path)
        client = subprocess.Popen(
            [*inside, sys.executable, "-m", "sharedfs.client", str(self.folder), str(self._control), target],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._clients.append((client, [*inside, "umount", "--lazy", target]))
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n", "the client did not start"
        return client

    def close(self) -> None:
        """Unmount. An unused client ends; a client in use is killed, and loses the data that it has not sent."""
        self.behave(stopped=False)
        for client, unmount in self._clients:
            subprocess.run(unmount, stderr=subprocess.DEVNULL, check=False)  # the client's node may have no power
            client.kill()
            client.wait()
            if client.stdout:
                client.stdout.close()


class Two:
    """The server, and the mounts ``a`` and ``b`` of two nodes."""

    def __init__(self, folder: Path) -> None:
        for name in ("server", "a", "b"):
            (folder / name).mkdir()
        self.server = Server(folder / "server", folder / "a", folder / "control.json")
        self.there, self.a, self.b = folder / "server", folder / "a", folder / "b"
        self.clients = {path: self.server.mount(path) for path in (self.a, self.b)}
