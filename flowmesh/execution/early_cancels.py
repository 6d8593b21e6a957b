"""Cancels that came before their tasks: kept for a while, and as many as a node may reasonably be told."""

from __future__ import annotations

import time
from collections.abc import Callable

KEPT_S = 600.0
KEPT_MOST = 10_000
"""The control channel goes to every node, so most of what is kept is for tasks of others."""


class EarlyCancels:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._came: dict[str, float] = {}
        """Oldest first."""

    def __len__(self) -> int:
        return len(self._came)

    def add(self, task_id: str) -> None:
        """Remember a cancel, from now on for KEPT_S; the oldest goes where there are too many."""
        now = self._clock()
        self._came.pop(task_id, None)
        self._came[task_id] = now
        while (oldest := next(iter(self._came))) != task_id:
            if len(self._came) <= KEPT_MOST and now - self._came[oldest] <= KEPT_S:
                break
            del self._came[oldest]

    def take(self, task_id: str) -> bool:
        """Whether this task was cancelled before it came; asked once."""
        came = self._came.pop(task_id, None)
        return came is not None and self._clock() - came <= KEPT_S
