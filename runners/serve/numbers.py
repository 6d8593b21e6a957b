"""What a gate measures of requests besides counting them: durations by bucket, in the node's buckets."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from flowmesh.messages.serving import BOUNDS


class Times:
    """Durations: how many fell into each bucket, and their sum.

    Args:
        kept: the values of an earlier one.
    """

    def __init__(self, kept: Sequence[float] = ()) -> None:
        self._counts = [int(each) for each in kept[:-1]] or [0] * (len(BOUNDS) + 1)
        self._sum = kept[-1] if kept else 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def values(self) -> tuple[float, ...]:
        """The counts by bucket, the last one without a bound, and the sum."""
        return (*self._counts, self._sum)
