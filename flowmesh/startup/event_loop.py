"""The event loop of the supervisor: its threads, its tasks, and the children that it reaps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = 8
CANCEL_AGAIN_S = 0.2


def start_threads() -> None:
    """Start the threads for blocking work now: later a task may have used up all processes that this user may have."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="flowmesh")
    all_there = threading.Barrier(THREADS)
    for _ in range(THREADS):
        pool.submit(all_there.wait)
    asyncio.get_running_loop().set_default_executor(pool)


async def end_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel these, repeatedly: redis-py loses a cancel that arrives together with a reply."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)


def reap_children() -> None:
    """Collect fork servers that ended, and their orphans, which were reparented to this subreaper."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
