"""Requests to the leader of a running job from outside its agents: by the batch script's trap, Ctrl-C, or a user."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.messages import LEAVE, ProtocolError, Request
from elastic_hpc.network import channel
from elastic_hpc.record.rundir import RunDir


def ask_leader(rundir: RunDir, request: Request, reason: str = "user") -> None:
    """Send ``request`` to the leader of the job in ``rundir``, with its ``reason``: ``time limit``, ``preempted`` or
    ``user``. Raises ElasticError if the leader cannot be reached.
    """
    _send(rundir, {"request": request, "reason": reason})


def ask_to_leave(rundir: RunDir, node: int, reason: str) -> None:
    """Ask the leader of the job in ``rundir`` to let the joiner ``node`` go. Raises ElasticError as ``ask_leader``."""
    _send(rundir, {"request": LEAVE, "node": node, "reason": reason})


def _send(rundir: RunDir, message: dict[str, Any]) -> None:
    endpoint = rundir.read("endpoint.json")
    if endpoint is None:
        raise ElasticError(f"{rundir.path}: no leader has been started yet")

    async def send() -> None:
        link = await channel.connect(endpoint["addresses"], endpoint["port"], rundir.read_secret())
        link.send(message)
        await link.flush()

    try:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(send())
        else:  # the caller runs in a notebook, or in an asyncio program
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, send()).result()
    except (OSError, ProtocolError, asyncio.TimeoutError) as error:
        raise ElasticError(
            f"the leader on {endpoint['host']} port {endpoint['port']} did not answer: {error}"
        ) from error
