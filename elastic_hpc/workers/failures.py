"""Why a worker failed: from its exit code, its stderr, and the error file that torch makes it write."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.agent.server.api import Worker
from torch.distributed.elastic.multiprocessing import PContext

from elastic_hpc.membership.causes import explain
from elastic_hpc.membership.messages import Failure
from elastic_hpc.membership.tracebacks import READ


def first_failure(
    failed: Mapping[Worker, int], node: str, context: PContext, *, oom: bool, kernel: Sequence[str] = ()
) -> Failure:
    """The first failure that is no echo of another: the failure with the oldest error file, else that of the lowest
    rank.

    ``failed``: exit codes of workers of ``node``. ``oom``: the kernel has killed a process there for lack of memory.
    ``kernel``: what the kernel has logged there in the meantime.
    """
    failures = [_failure(worker, code, node, context, oom=oom, kernel=kernel) for worker, code in failed.items()]
    return min(failures, key=lambda failure: (failure.collateral, failure.time))


def stderr_tail(path: str | os.PathLike[str]) -> str:
    """The last 64 KiB of what a worker has written to ``path``; empty if the file cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - READ))
        return file.read(READ).decode(errors="replace")
    return ""


def _failure(worker: Worker, code: int, node: str, context: PContext, *, oom: bool, kernel: Sequence[str]) -> Failure:
    local = worker.local_rank
    cause = explain(code, stderr_tail(context.stderrs[local]), oom=oom, kernel=kernel)
    failed_at = time.time()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        error = json.loads(Path(context.error_files[local]).read_text())["message"]
        failed_at = float(error["extraInfo"]["timestamp"])
    return Failure(
        cause.kind,
        node,
        worker.global_rank,
        local,
        code,
        cause.message[:2000],
        failed_at,
        (cause.traceback or "")[:8192],
        cause.collateral,
        cause.known,
    )
