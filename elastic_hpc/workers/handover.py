"""Makes torch's agent use kept workers and standbys where it would start new processes.

``get_subprocess_handler`` is private to torch. In a release that has moved it, all workers start as torch starts them.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Iterator
from typing import Any

from torch.distributed.elastic.multiprocessing import api as multiprocessing
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from elastic_hpc.workers.lives import Lives
from elastic_hpc.workers.standbys import Standbys


class StandbyHandler(SubprocessHandler):
    """Takes the kept worker or a standby; without either, starts a process like torch's class."""

    def __init__(self, lives: Lives, standbys: Standbys, **kwargs: Any) -> None:
        self._lives, self._standbys, self._local_rank = lives, standbys, int(kwargs["local_rank_id"])
        super().__init__(**kwargs)

    @classmethod
    @contextlib.contextmanager
    def used(cls, lives: Lives, standbys: Standbys) -> Iterator[None]:
        """Within the block, torch's agent starts workers with this class."""
        before = multiprocessing.get_subprocess_handler
        multiprocessing.get_subprocess_handler = functools.partial(cls, lives, standbys)
        try:
            yield
        finally:
            multiprocessing.get_subprocess_handler = before

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        outputs = [file.fileno() if file else number for number, file in ((1, self._stdout), (2, self._stderr))]
        ready = self._lives.take(self._local_rank, env, outputs) or self._standbys.take(args, env, outputs)
        process: subprocess.Popen[bytes] = ready or super()._popen(args, env)
        return process
