"""What the charts of a page are drawn from: shares of a width, and the points of a line. Text stays in HTML."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import msgspec

from flowmesh.cli import render
from flowmesh.cli.show import LABELS, moments
from flowmesh.tasks.history import Detail

WIDTH, HEIGHT = 600.0, 160.0
"""Of a line chart, in its own units; it is stretched."""
MOST_POINTS = 600
_BETWEEN = {
    "received": "queued",
    "launching": "launch",
    "running": "run",
    "stopping": "stop",
    "releasing": "release",
    "delivering": "deliver",
}
"""What goes on from one state to the next, by the first."""


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a chart of bars. `start` and `length` are shares of the width, in percent."""

    name: str
    start: float = 0.0
    length: float
    text: str
    kind: str = ""
    """A class of the style sheet."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A chart of one line."""

    points: str
    """As the attribute of an SVG polyline."""
    low: str
    high: str
    first: str
    last: str
    latest: str


def timeline(detail: Detail) -> list[Bar]:
    """When each state of a task began and how long it took; phases of the run lie within it."""
    found = moments(detail)
    if not found:
        return []
    begin = found[0][1]
    open_end = found[-1][0] != "done"
    end = max(time.time(), found[-1][1]) if open_end else found[-1][1]
    span = max(end - begin, 1e-3)
    bars: list[Bar] = []
    for index, (name, at) in enumerate(found):
        if name not in _BETWEEN:
            continue
        until = found[index + 1][1] if index + 1 < len(found) else end
        running = " so far" if open_end and index + 1 == len(found) else ""
        text = render.seconds(max(0.0, until - at)) + running
        bars.append(_bar(_BETWEEN[name], (at - begin, until - at), span, text=text, kind=_BETWEEN[name]))
        if name == "running":
            bars += _phases(detail.phases, at - begin, span)
    return bars


def events(detail: Detail) -> list[tuple[str, float]]:
    """(what happened, seconds since 1970)"""
    return [(LABELS[name], at) for name, at in moments(detail)]


def _phases(phases: Mapping[str, float], at: float, span: float) -> list[Bar]:
    bars = []
    for name, seconds in list(phases.items())[:40]:
        bars.append(_bar(name, (at, seconds), span, text=render.seconds(seconds), kind="phase"))
        at += seconds
    return bars


def _bar(name: str, place: tuple[float, float], span: float, *, text: str, kind: str) -> Bar:
    start, length = place
    left = min(99.5, max(0.0, 100 * start / span))
    return Bar(name=name, start=round(left, 3), length=round(_share(length, span, 100 - left), 3), text=text, kind=kind)


def _share(part: float, whole: float, most: float) -> float:
    return min(most, max(0.5, 100 * part / whole))


def compared(values: Mapping[str, tuple[float, str]]) -> list[Bar]:
    """Amounts beside each other, the largest over the whole width.

    Args:
        values: by name: the amount, and its text.
    """
    most = max((value for value, _ in values.values()), default=0.0)
    if most <= 0 or not math.isfinite(most):
        return []
    return [Bar(name=name, length=_share(value, most, 100), text=text) for name, (value, text) in values.items()]


def line(points: Sequence[tuple[float, float]], unit: str = "") -> Line | None:
    """A chart of values over something; None without two finite points."""
    finite = [each for each in points if math.isfinite(each[0]) and math.isfinite(each[1])]
    if len(finite) < 2:
        return None
    step = math.ceil(len(finite) / MOST_POINTS)
    shown = [*finite[:-1:step], finite[-1]]
    low_x, high_x = shown[0][0], shown[-1][0]
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    place = " ".join(
        f"{WIDTH * _part(x, low_x, high_x):.1f},{4 + (HEIGHT - 8) * (1 - _part(y, low, high)):.1f}" for x, y in shown
    )
    return Line(
        points=place,
        low=f"{low:.4g}{unit}",
        high=f"{high:.4g}{unit}",
        first=f"{low_x:g}",
        last=f"{high_x:g}",
        latest=f"{shown[-1][1]:.4g}{unit}",
    )


def _part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
