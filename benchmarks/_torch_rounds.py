"""torch's c10d rendezvous at scale, for scale.py."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from _agents import allow_files

LAST_CALL = 1
"""torch's ``last_call_timeout`` in seconds: the minimum that torch accepts; its default is 30."""


def torch_rounds(size: int, bound: float) -> dict[str, Any]:
    """The same with torch's dynamic rendezvous on one TCPStore, with one thread for each handler."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_torch_rounds, args=(theirs, size, bound), daemon=True)
    process.start()
    theirs.close()
    result: dict[str, Any] = {"what": "torch c10d", "agents": size, "bound_s": bound, "form_s": None, "reform_s": None}
    try:
        with contextlib.suppress(EOFError):
            while ours.poll(2 * bound + 60):
                result |= ours.recv()
    finally:
        process.kill()
        process.join()
    return result


def _torch_rounds(pipe: Connection, size: int, bound: float) -> None:
    # the processes with our agents do not import torch
    from torch.distributed import TCPStore  # noqa: PLC0415
    from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous  # noqa: PLC0415
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend  # noqa: PLC0415

    logging.disable()
    allow_files()
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=bound))
    handlers = []
    for _ in range(size):
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=bound))
        params = RendezvousParameters(
            "c10d",
            f"127.0.0.1:{server.port}",
            "scale",
            size - 1,
            size,
            local_addr="127.0.0.1",
            join_timeout=bound,
            last_call_timeout=LAST_CALL,
        )
        handlers.append(dynamic_rendezvous.create_handler(store, C10dRendezvousBackend(store, "scale"), params))

    def all_join(handlers: list[Any]) -> float | None:
        """Seconds until all agents have their rank; None if some agents get no rank."""
        problems: list[BaseException] = []

        def join(handler: Any) -> None:
            try:
                handler.next_rendezvous()
            except Exception as error:  # noqa: BLE001 - the bound has passed, or the rendezvous failed
                problems.append(error)

        began = time.monotonic()
        threads = [threading.Thread(target=join, args=(handler,), daemon=True) for handler in handlers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, began + bound - time.monotonic()))
        whole = not problems and not any(thread.is_alive() for thread in threads)
        return time.monotonic() - began if whole else None

    formed = all_join(handlers)
    pipe.send({"form_s": formed})
    if formed is not None:
        lost = handlers.pop(size // 2)
        lost._stop_heartbeats()  # noqa: SLF001 - it leaves in order: else the others wait for its keep-alive to run out
        lost._op_executor.run(dynamic_rendezvous._RendezvousExitOp(), time.monotonic() + bound)  # noqa: SLF001
        pipe.send({"reform_s": all_join(handlers)})
    os._exit(0)
