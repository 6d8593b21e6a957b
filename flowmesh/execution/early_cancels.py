"""Cancels that arrived before their tasks: kept for a limited time, and in a limited number."""

from __future__ import annotations

import time
from collections.abc import Callable

KEPT_S = 600.0
KEPT_MOST = 10_000
"""The control channel goes to every node, so most of the cancels that a node keeps are for other nodes' tasks."""


class EarlyCancels:
    """
    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrived: dict[str, float] = {}
        """When each cancel arrived, by task id; the oldest is first."""

    def __len__(self) -> int:
        return len(self._arrived)

    def add(self, task_id: str) -> None:
        """Remember a cancel for KEPT_S from now. The oldest one is dropped if there are more than KEPT_MOST."""
        now = self._clock()
        self._arrived.pop(task_id, None)
        self._arrived[task_id] = now
        while (oldest := next(iter(self._arrived))) != task_id:
            if len(self._arrived) <= KEPT_MOST and now - self._arrived[oldest] <= KEPT_S:
                break
            del self._arrived[oldest]

    def take(self, task_id: str) -> bool:
        """Whether this task was cancelled before it arrived. Drops the cancel."""
        arrived = self._arrived.pop(task_id, None)
        return arrived is not None and self._clock() - arrived <= KEPT_S
