"""Calls that may block, for a control thread that must not: each call runs on a thread of its own, which can be
abandoned. In a pool of threads, calls to a file system that stalls would keep those that wait behind them from running.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, ParamSpec, TypeVar

from elastic_hpc.errors import ElasticError

P = ParamSpec("P")
T = TypeVar("T")


def start(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call ``work`` on a daemon thread: a thread that never ends does not keep the process."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            answer = work(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - raised where the result is waited for
            result.set_exception(error)
        else:
            result.set_result(answer)

    result.set_running_or_notify_cancel()
    threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    return result


async def on_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """As ``asyncio.to_thread``, but on a thread of its own."""
    return await asyncio.wrap_future(start(work, *args, **kwargs))


def within(seconds: float, work: Callable[[], object]) -> None:
    """Call ``work``, and wait at most ``seconds`` for its end; what it raises is ignored."""
    wait([start(work)], seconds)


class Reader(Generic[T]):
    """Reads again and again from a file system that may stall, never twice at a time."""

    def __init__(self, read: Callable[[], T], seconds: float) -> None:
        """``seconds``: how long an answer is waited for."""
        self._read = read
        self._seconds = seconds
        self._answer: asyncio.Future[T] | None = None
        """The answer to a call of ``read``, until a caller has it."""

    async def read(self) -> T:
        """What ``read`` returns or raises. Raises ElasticError if there is no answer in time; the next call goes on
        waiting for that answer.
        """
        answer = self._answer
        if answer is None:
            answer = self._answer = asyncio.ensure_future(on_thread(self._read))
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # there may be no next call
        await asyncio.wait([answer], timeout=self._seconds)
        if not answer.done():
            raise ElasticError(f"the file system has not answered for {self._seconds:g} s")
        if self._answer is answer:
            self._answer = None
        return answer.result()
