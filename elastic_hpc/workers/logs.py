"""The files that the workers of a node write to, and the output that torch's agent shows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs


class NodeLogs(LogsSpecs):
    """``logs/<requeue>.<round>/<node>/rank<k>.{out,err}`` in the run directory, also shown on the agent's own output.

    Where the folder cannot be made, the workers write to the agent's output alone.
    """

    def __init__(self, root: Path, run: int, node: str, shown: str | None = None) -> None:
        """``shown``: the local ranks whose output is shown, ``0,1``; None for all."""
        super().__init__(log_dir=str(root))
        self._root, self._run, self._node = root, run, node
        self._shown = None if shown is None else set(map(int, shown.split(",")))

    @property
    def root_log_dir(self) -> str:
        return str(self._root)

    @property
    def folder(self) -> Path:
        """The folder of the current round."""
        return self._root / f"{self._run}.{os.environ['ELASTIC_HPC_ROUND']}" / self._node

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        folder = self.folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for env in envs.values():  # torch would fail later, when it opens them
                for kind in ("out", "err"):
                    (folder / f"rank{env['RANK']}.{kind}").touch(mode=0o600)
        except OSError as error:
            print(f"{folder}: {error.strerror}; the workers' output goes to this agent's alone", file=sys.stderr)
            return LogsDest(dict.fromkeys(envs, ""), dict.fromkeys(envs, ""), {}, {}, dict.fromkeys(envs, os.devnull))
        paths: dict[str, dict[int, str]] = {
            kind: {local: str(folder / f"rank{env['RANK']}.{kind}") for local, env in envs.items()}
            for kind in ("out", "err", "error.json")
        }
        for local, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = paths["error.json"][local]
        out, err = (
            {local: path for local, path in paths[kind].items() if self._shown is None or local in self._shown}
            for kind in ("out", "err")
        )
        return LogsDest(paths["out"], paths["err"], out, err, paths["error.json"])
