"""Has torch's agent take standbys where it would start new processes.

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

from elastic_hpc.workers.standbys import Standbys


class StandbyHandler(SubprocessHandler):
    """Takes a standby as the worker, or starts a process as torch's class does if no standby is left."""

    def __init__(self, standbys: Standbys, **kwargs: Any) -> None:
        self._standbys = standbys
        super().__init__(**kwargs)

    @classmethod
    @contextlib.contextmanager
    def used(cls, standbys: Standbys) -> Iterator[None]:
        """Within the block, torch's agent starts workers by this class."""
        before = multiprocessing.get_subprocess_handler
        multiprocessing.get_subprocess_handler = functools.partial(cls, standbys)
        try:
            yield
        finally:
            multiprocessing.get_subprocess_handler = before

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        outputs = [file.fileno() if file else number for number, file in ((1, self._stdout), (2, self._stderr))]
        standby = self._standbys.take(args, env, outputs)
        process: subprocess.Popen[bytes] = standby or super()._popen(args, env)
        return process
