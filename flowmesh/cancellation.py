"""Ending tasks of the event loop for certain: redis-py loses a cancel that arrives together with a reply."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

__all__ = ["end_all", "run_all"]

CANCEL_AGAIN_S = 0.2


async def end_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel these repeatedly until all have ended. A cancel of the caller waits for that too."""
    left = set(tasks)
    cancelled: asyncio.CancelledError | None = None
    while left:
        for task in left:
            task.cancel()
        try:
            _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def run_all(*works: Coroutine[Any, Any, Any]) -> None:
    """Run these at once until all have ended. With a cancel, or the error of one, all end before this does.

    `asyncio.gather` returns with the first one that is cancelled: one that lost its cancel would run on, unseen.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end_all(tasks)
