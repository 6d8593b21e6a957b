"""The event loop of the supervisor: its threads, and the children that it reaps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

THREADS = 8


def start_threads() -> None:
    """Start the threads for blocking work now: later a task may have used up all processes that this user may have."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="flowmesh")
    all_there = threading.Barrier(THREADS)
    for _ in range(THREADS):
        pool.submit(all_there.wait)
    asyncio.get_running_loop().set_default_executor(pool)


def reap_children() -> None:
    """Collect fork servers that ended, and their orphans, which were reparented to this subreaper."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
