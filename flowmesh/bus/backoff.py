"""The waits between two tries to reach Redis: short at first, never long, and not the same on every node."""

from __future__ import annotations

import random

FIRST_S = 0.1
LONGEST_S = 5.0


class Backoff:
    """Doubles with each failure, with full jitter above half; starts anew after a success."""

    def __init__(self) -> None:
        self._next_s = FIRST_S

    def reset(self) -> None:
        self._next_s = FIRST_S

    @property
    def fresh(self) -> bool:
        """Whether nothing has failed since the last success."""
        return self._next_s == FIRST_S

    def next_s(self) -> float:
        wait_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, LONGEST_S)
        return wait_s
