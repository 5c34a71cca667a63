"""Requests to the leader of a running job from outside its agents: by the batch script, Ctrl-C, or a user.

The run directory may name a leader that is lost: it may have been full, or read-only, when another agent took over. So
the client also asks the other agents that the run directory names, and follows redirects.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import LEAVE, RESIZE, STAY, ProtocolError, Redirect, Request
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.wishes import Bounds
from elastic_hpc.network import channel
from elastic_hpc.network.identity import OUTSIDE, Identity, RunIsOver
from elastic_hpc.network.tasks import end, within
from elastic_hpc.record.endpoint import read_published
from elastic_hpc.record.rundir import RunDir

PATIENCE = 30.0
"""Seconds to wait for the end of a take-over, as long as any agent of the job answers."""

_DIAL_TIMEOUT = 3.0
_PAUSE = 0.5

_FAILED = (OSError, ProtocolError, RunIsOver, asyncio.TimeoutError)


def ask_leader(rundir: RunDir, request: Request, reason: str = "user", run: int | None = None) -> None:
    """Send ``request`` to the leader of the job in ``rundir``, with its ``reason``: ``time limit``, ``preempted`` or
    ``user``. Returns when the leader has accepted the request. With ``run``, only a leader of that run may accept it.
    Raises ElasticError if the leader cannot be reached.
    """
    _send(rundir, {"request": request, "reason": reason}, run)


def ask_to_leave(
    rundir: RunDir, node: int | str, reason: str, *, exclude: bool = False, give_back: bool = False
) -> str:
    """Ask the leader of the job in ``rundir`` to release ``node``, as in ``messages.Leave``. Returns what happens to
    the request, if there is more to say. Raises ElasticError like ``ask_leader``, and if the leader refuses.
    """
    how = {"exclude": exclude, "give_back": give_back}
    return _send(rundir, {"request": LEAVE, "node": node, "reason": reason, **how})


def ask_to_stay(rundir: RunDir, node: str) -> str:
    """Withdraw ``ask_to_leave``. Raises ElasticError like ``ask_leader``."""
    return _send(rundir, {"request": STAY, "node": node})


def ask_to_resize(rundir: RunDir, sizes: tuple[int, ...]) -> str:
    """Ask the leader of the job in ``rundir`` for worlds of ``sizes``, ascending. Returns and raises like
    ``ask_to_leave``.
    """
    return _send(rundir, {"request": RESIZE, **Bounds(sizes[0], sizes[-1], sizes).body})


def _send(rundir: RunDir, message: dict[str, Any], run: int | None = None) -> str:
    published = read_published(rundir)
    if published is None:
        raise ElasticError(f"{rundir.path}: no leader has been started yet")
    of_run = published.run if run is None else run
    me = Identity(published.job, of_run, OUTSIDE, socket.gethostname(), secrets.token_hex(8))
    search = _Search(me, rundir.read_secret(), message, run)
    work = search.send(published.leader, published.others)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:  # the caller runs in a notebook, or in an asyncio program
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work).result()
    if search.refusal:
        raise ElasticError(search.refusal)
    return search.answer


class _Search:
    """Looks for the agent that accepts ``message``."""

    def __init__(self, me: Identity, secret: bytes, message: dict[str, Any], run: int | None) -> None:
        self._me = me
        self._run = run
        self._secret = secret
        self._message = message
        self._problems: dict[Host, str] = {}
        """The last problem with each agent."""
        self.answer = self.refusal = ""
        """The leader's answer or refusal."""

    async def send(self, leader: Host, others: Iterable[Host]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not await self._ask_all(leader, others):
            if time.monotonic() > deadline or _NO_LEADER not in self._problems.values():
                raise ElasticError(self._no_answer(leader))
            await asyncio.sleep(_PAUSE)

    async def _ask_all(self, leader: Host, others: Iterable[Host]) -> bool:
        """Whether ``leader`` has accepted the message, or else one of the ``others``, or the leader that they name."""
        self._problems = {}
        tries = {asyncio.ensure_future(self._try(leader))}
        done, _ = await asyncio.wait(tries, timeout=_DIAL_TIMEOUT)
        if not any(task.result() for task in done):
            tries |= {asyncio.ensure_future(self._try(host)) for host in others}
        try:
            for answer in asyncio.as_completed(tries):
                if await answer:
                    return True
        finally:
            await end(tries)  # their connections are closed by then
        return False

    async def _try(self, host: Host) -> bool:
        """Whether ``host``, or the leader that it names, has accepted the message."""
        if host in self._problems:
            return False
        self._problems[host] = "asked"
        try:
            link = await self._connect(host)
            try:
                link.send(self._message)
                reply = messages.decode_from_leader(await within(_DIAL_TIMEOUT, link.read()))
            finally:
                link.close()
        except _FAILED as error:
            self._problems[host] = str(error) or "no answer"
            return False
        if isinstance(reply, Redirect) and reply.leads and reply.to and reply.to.node == host.node:
            self.answer, self.refusal = reply.answer, reply.refusal
            return True
        self._problems[host] = _NO_LEADER
        return isinstance(reply, Redirect) and reply.to is not None and await self._try(reply.to)

    async def _connect(self, host: Host) -> channel.Channel:
        """The run directory may have been full since the previous run: then the agent says which run is active."""
        try:
            return await channel.connect(host, self._me, self._secret, timeout=_DIAL_TIMEOUT)
        except RunIsOver as over:
            if self._run is not None:
                raise
            self._me = replace(self._me, run=over.at_work)
            return await channel.connect(host, self._me, self._secret, timeout=_DIAL_TIMEOUT)

    def _no_answer(self, leader: Host) -> str:
        others = [host.name for host in self._problems if host != leader]
        text = f"the leader on {leader.name} port {leader.port} did not answer: {self._problems[leader]}"
        if self._problems[leader] == _NO_LEADER:
            text = f"the agent on {leader.name} port {leader.port} no longer leads"
        if others:
            text += f"; no other agent leads either (asked: {', '.join(others)})"
        return text


_NO_LEADER = "it has no leader"
