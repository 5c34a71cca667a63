"""Tasks that end when they are cancelled.

``asyncio.wait_for`` of Python before 3.12 ignores a cancellation that comes together with the result: a leader, or a
search for the leader, that is cancelled at that moment would continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float | None, work: Awaitable[T]) -> T:
    """The result of ``work``. Raises asyncio.TimeoutError if ``work`` takes longer, and cancels it. None: no limit."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        await end([task])
    if not done:
        raise asyncio.TimeoutError
    return task.result()


async def end(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel ``tasks``, and wait until they have ended. The tasks still have their results and exceptions."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # asyncio logs exceptions that were not retrieved
