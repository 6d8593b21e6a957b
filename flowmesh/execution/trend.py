"""How a task's loss and its rate went so far: a few points over the whole run, for `flowmesh top`."""

from __future__ import annotations

import math
from collections.abc import Mapping

MOST_POINTS = 64
"""When there are as many, every second one is dropped, and from then on every second one is kept."""
FOLLOWED = ("loss", "tokens_per_s")


class Trend:
    """Bounded in memory and in time per progress frame, however many frames a task sends."""

    def __init__(self) -> None:
        self._points: dict[str, list[float]] = {name: [] for name in FOLLOWED}
        self._stride: dict[str, int] = dict.fromkeys(FOLLOWED, 1)
        self._seen: dict[str, int] = dict.fromkeys(FOLLOWED, 0)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of one progress frame."""
        for name in FOLLOWED:
            value = metrics.get(name)
            if value is None or not math.isfinite(value):
                continue
            points = self._points[name]
            if self._seen[name] % self._stride[name] == 0:
                points.append(float(value))
            self._seen[name] += 1
            if len(points) >= MOST_POINTS:
                del points[1::2]
                self._stride[name] *= 2

    def points(self) -> dict[str, list[float]]:
        """The kept values by metric, oldest first; metrics without any are left out."""
        return {name: [float(f"{value:.6g}") for value in points] for name, points in self._points.items() if points}
