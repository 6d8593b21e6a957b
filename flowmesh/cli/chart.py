"""Bars, sparklines and line charts of characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
FULL, EMPTY = "█", "░"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a braille character, by row from the top and by column."""

ASCII = str.maketrans(
    {
        **dict(zip(BLOCKS, ".:-=+*#@", strict=True)),
        FULL: "#",
        EMPTY: ".",
        **dict.fromkeys(_EIGHTHS[1:], "="),
        "…": "~",
        "▸": ">",
        "─": "-",
        "·": "|",
        "↑": "^",
        "↓": "v",
        "│": "|",
        "┤": "|",
        "└": "+",
        "°": "",
    }
)
"""For terminals without UTF-8."""


def bar(share: float | None, width: int) -> str:
    """A bar of `width` cells, filled from the left; all empty where the share is not known.

    Args:
        share: 0 to 1; what lies outside is cut.
    """
    if share is None or not math.isfinite(share):
        return EMPTY * width
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    text = FULL * whole + (_EIGHTHS[rest] if rest else "")
    return text + EMPTY * (width - len(text))


def spark(values: Sequence[float], width: int) -> str:
    """The values as a row of blocks, at most `width`; each stands for the mean of its part of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    means = thinned(finite, width)
    low, high = min(means), max(means)
    span = high - low
    if span <= 0:
        return BLOCKS[3] * len(means)
    return "".join(BLOCKS[min(7, int((value - low) / span * 8))] for value in means)


def thinned(values: Sequence[float], most: int) -> list[float]:
    """At most `most` values: the means of equal parts."""
    if len(values) <= most:
        return list(values)
    edges = [round(number * len(values) / most) for number in range(most + 1)]
    return [sum(part) / len(part) for low, high in itertools.pairwise(edges) if (part := values[low:high])]


def braille(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """A line chart: `height` lines of `width` braille characters, 2 × 4 dots each. Points are joined in their order."""
    cells = [[0] * width for _ in range(height)]
    columns, rows = 2 * width, 4 * height
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[int, int]:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.0
        up = (y - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return round(across * (columns - 1)), round((1 - up) * (rows - 1))

    def dot(column: int, row: int) -> None:
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    last: tuple[int, int] | None = None
    for x, y in points:
        here = place(x, y)
        for column, row in _between(last or here, here):
            dot(column, row)
        last = here
    return ["".join(chr(_BRAILLE + bits) for bits in line) for line in cells]


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            round(start[0] + (end[0] - start[0]) * step / steps),
            round(start[1] + (end[1] - start[1]) * step / steps),
        )
        for step in range(steps + 1)
    ]
