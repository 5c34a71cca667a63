"""Calls that may block, for a control thread that must not block: each call runs on a thread of its own, which the
caller can abandon. In a pool, calls to a stalled file system would occupy all threads, and later calls would wait.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, ParamSpec, TypeVar

from elastic_hpc.errors import ElasticError

P = ParamSpec("P")
T = TypeVar("T")


def start(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call ``work`` on a daemon thread: a thread that never ends does not keep the process alive."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            answer = work(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the caller gets it from the future
            result.set_exception(error)
        else:
            result.set_result(answer)

    result.set_running_or_notify_cancel()
    threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    return result


async def on_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Like ``asyncio.to_thread``, but on a thread of its own."""
    return await asyncio.wrap_future(start(work, *args, **kwargs))


def run_while_processes_start() -> None:
    """Let all threads continue while ``subprocess`` starts a process. With vfork and posix_spawn, they would be blocked
    until the child runs its program, which takes until the file server with the program answers
    (python/cpython#104372). Without effect before Python 3.10.5.
    """
    subprocess._USE_VFORK = False  # type: ignore[attr-defined]  # noqa: SLF001 - documented, as is _USE_POSIX_SPAWN
    subprocess._USE_POSIX_SPAWN = False  # type: ignore[misc]  # noqa: SLF001


def within(seconds: float, work: Callable[[], object]) -> None:
    """Call ``work``, and wait at most ``seconds`` until it returns; ignore what it raises."""
    wait([start(work)], seconds)


class ThreadedReader(Generic[T]):
    """Calls ``read``, which may block on a stalled file system, on a thread: never twice at the same time."""

    def __init__(self, read: Callable[[], T], seconds: float) -> None:
        """``seconds``: how long a caller waits for the result."""
        self._read = read
        self._seconds = seconds
        self._answer: asyncio.Future[T] | None = None
        """The result of a call of ``read`` that no caller has got yet."""

    async def read(self) -> T:
        """What ``read`` returns or raises. Raises ElasticError if ``read`` has not returned in time; the next call of
        this method waits for the same result.
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
