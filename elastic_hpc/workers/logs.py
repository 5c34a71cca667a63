"""Where torch lets the workers of a node write, and which ranks the agent shows on its own output."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from elastic_hpc.record.worker_logs import Stream, file_name
from elastic_hpc.training.progress import LOCAL_DIR
from elastic_hpc.workers.output import LogFile, Output, Terminal, is_shown


class NodeLogs(LogsSpecs):
    """Lets the workers write to memory of this node; ``Output`` copies that to
    ``logs/RUN.ROUND/NODE.rankFIRST-LAST.log`` in the run directory. So the start of a round needs no shared file
    system.
    """

    def __init__(self, root: Path, run: int, node: str, tee: str | None = None, local_ranks: str | None = None) -> None:
        """``tee``: the ranks whose output the agent also shows (--tee). ``local_ranks``: of these ranks, the agent
        shows only these local ranks of each node (--local-ranks-filter).
        """
        super().__init__(log_dir=str(root))
        self._root, self._run, self._node = root, run, node
        self._tee, self._local_ranks = tee, local_ranks
        self._log_file = LogFile()
        self._terminals: dict[Stream, Terminal] = {"out": Terminal(1), "err": Terminal(2)}
        self._output: Output | None = None

    @property
    def root_log_dir(self) -> str:
        return str(self._root)

    @property
    def folder(self) -> Path:
        """The folder of the current round."""
        return self._root / f"{self._run}.{os.environ['ELASTIC_HPC_ROUND']}"

    @property
    def written(self) -> int:
        """Bytes of output of the workers of this round."""
        return self._output.size if self._output else 0

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by torch's agent before it starts the workers that have ``envs``."""
        self.finish()
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        shown = {rank for local, rank in ranks.items() if is_shown(self._tee, self._local_ranks, rank, local)}
        path = self.folder / file_name(self._node, list(ranks.values()))
        self._output = Output(ranks, shown, path, self._log_file, self._terminals)
        errors = {local: os.path.join(os.environ[LOCAL_DIR], f"rank{rank}.error.json") for local, rank in ranks.items()}
        for local, env in envs.items():
            env["TORCHELASTIC_ERROR_FILE"] = errors[local]
        return LogsDest(self._output.paths("out"), self._output.paths("err"), {}, {}, errors)

    def finish(self) -> None:
        """The workers of the round have ended. Does not wait until the rest of their output is copied."""
        if self._output:
            self._output.finish()

    def close(self, timeout: float) -> None:
        """Wait, at most ``timeout`` seconds, until all output is copied."""
        self.finish()
        deadline = time.monotonic() + timeout
        if self._output:
            self._output.join(timeout)
        for destination in (self._log_file, *self._terminals.values()):
            destination.close(deadline - time.monotonic())
