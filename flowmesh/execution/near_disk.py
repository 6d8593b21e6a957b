"""Short work on the disk that has the journal: on the loop while that disk is quick, else in a thread.

The loop waits for that disk at each step of a task in any case. To hand something to a thread and to take it back costs
more than the few files of a small task, and each of the two waits until the thread, or the loop, is scheduled.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

QUICK_S = 0.02
"""What has taken longer is done in a thread from then on, until it takes less there."""

P = ParamSpec("P")
T = TypeVar("T")


class NearDisk:
    """
    Args:
        results_dir: where tasks have their folders, absolute.
        is_shared: whether it was on the journal's file system when it was looked at last.
    """

    def __init__(self, results_dir: Path, is_shared: Callable[[], bool]) -> None:
        self._inside = f"{results_dir}{os.sep}"
        self._is_shared = is_shared
        self._quick = True

    def has(self, out_dir: str) -> bool:
        """Whether a task's folder is on it. Does not ask the disk: another one might not answer."""
        return out_dir.startswith(self._inside) and self._is_shared()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that takes a few files at most, all on this disk."""
        began = time.monotonic()
        try:
            if self._quick:
                return work(*args, **kwargs)
            return await asyncio.to_thread(work, *args, **kwargs)
        finally:
            self._quick = time.monotonic() - began < QUICK_S
