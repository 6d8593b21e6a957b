"""The wait between two attempts: exponential, with equal jitter, so that nodes do not retry in step."""

from __future__ import annotations

import random


class Backoff:
    """Doubles with each failure; each wait is between half of the step and all of it (equal jitter).

    Args:
        first_s: the first step.
        longest_s: the largest step.
    """

    def __init__(self, first_s: float = 0.1, longest_s: float = 5.0) -> None:
        self._first_s = min(first_s, longest_s)
        self._longest_s = longest_s
        self._step_s = self._first_s

    def next_s(self) -> float:
        """How long to wait after one more failure."""
        wait_s = self._step_s * random.uniform(0.5, 1.0)
        self._step_s = min(self._step_s * 2, self._longest_s)
        return wait_s

    def reset(self) -> None:
        """Start from the first step again, after a success."""
        self._step_s = self._first_s
