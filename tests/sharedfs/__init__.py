"""A shared file system of the tests' own that behaves like NFS: a server, which is a folder, and clients, which are
mounts with caches of their own. A test switches faults while it runs, by a file outside of the mounts.

``client`` is a mount. It answers the ``operations`` that the kernel asks for by ``fuse``, out of a ``cache`` or over a
``link`` to the server, which has the faults. What differs from NFS: locks (``flock``) hold within a node only.
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
    """How the server behaves, and for how long a client believes what it knows: the defaults are those of nfs(5)."""

    attributes_s: float = 3.0
    """For how long a client believes the size and the times of a file; a process that opens it makes the client ask."""
    names_s: float = 30.0
    """For how long a client believes which names are in a folder; a process that lists it makes the client ask."""
    write_back_s: float = 30.0
    """After how long what was written goes to the server; a process that closes or syncs the file sends it at once."""
    metadata_s: float = 0.0
    """How long a question about names or attributes takes."""
    stopped: bool = False
    """Who needs the server waits, in state D, until it is false again."""
    like_fuse: bool = False
    """When a client is mounted: signals interrupt who waits, which is in state S, as with any other FUSE."""
    over_quota: bool = False
    """Nothing is made and no file grows: EDQUOT. A write says so only when the data goes to the server."""
    epoch: int = 0
    """With another number the server forgets all open files and folders: ESTALE."""

    @staticmethod
    def read(file: Path) -> Behaviour:
        return Behaviour(**json.loads(file.read_text()))


class Server:
    """``folder``: what the server has. ``path``: where each client sees that."""

    def __init__(self, folder: Path, path: Path, control: Path) -> None:
        self.folder, self.path = folder, path
        self._control = control
        self._behaviour = Behaviour()
        self._clients: list[tuple[subprocess.Popen[str], list[str]]] = []
        """With the command that unmounts."""
        self.behave()

    def behave(self, **changes: float) -> None:
        """``behave(stopped=True)``; what is not named stays."""
        self._behaviour = replace(self._behaviour, **changes)
        new = self._control.with_suffix(".new")
        new.write_text(json.dumps(asdict(self._behaviour)))
        new.replace(self._control)

    def mount(self, path: Path | None = None, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Mount at ``path`` as one more client. ``inside``: the command that enters the namespaces of a node."""
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
        """Unmount. A client that no process uses any more ends; the others are killed, and lose what is not written."""
        self.behave(stopped=False)
        for client, unmount in self._clients:
            subprocess.run(unmount, stderr=subprocess.DEVNULL, check=False)  # its node may be without power
            client.kill()
            client.wait()
            if client.stdout:
                client.stdout.close()


class Two:
    """The server, and what the nodes ``a`` and ``b`` see of it."""

    def __init__(self, folder: Path) -> None:
        for name in ("server", "a", "b"):
            (folder / name).mkdir()
        self.server = Server(folder / "server", folder / "a", folder / "control.json")
        self.there, self.a, self.b = folder / "server", folder / "a", folder / "b"
        self.clients = {path: self.server.mount(path) for path in (self.a, self.b)}
