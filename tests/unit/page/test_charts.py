"""What charts are drawn from: shares and points that stay inside, whatever the values are."""

from __future__ import annotations

import math

from flowmesh.page import charts
from flowmesh.tasks.history import Detail

MARKS = {
    "received": 100.0,
    "launching": 101.0,
    "running": 102.0,
    "releasing": 108.0,
    "delivering": 109.0,
    "done": 110.0,
}


def test_a_timeline_has_each_part_in_its_place() -> None:
    bars = charts.timeline(Detail(marks=MARKS, phases={"load": 2.0, "train": 4.0}))
    assert [(bar.name, bar.start, bar.length) for bar in bars] == [
        ("queued", 0, 10), ("launch", 10, 10), ("run", 20, 60), ("load", 20, 20), ("train", 40, 40),
        ("release", 80, 10), ("deliver", 90, 10),
    ]  # fmt: skip
    assert charts.timeline(Detail()) == []
    for odd in ({"received": 5.0}, {"received": 5.0, "done": 5.0}, MARKS | {"running": 1.0}):
        assert all(bar.start >= 0 and bar.start + bar.length <= 100.01 for bar in charts.timeline(Detail(marks=odd)))


def test_a_line_keeps_its_ends_and_leaves_out_what_is_no_number() -> None:
    line = charts.line([(0, math.nan), *((step, 10.0 - step / 1000) for step in range(1, 10_001)), (7, math.inf)])
    assert line is not None
    points = [tuple(map(float, each.split(","))) for each in line.points.split()]
    assert len(points) <= charts.MOST_POINTS + 1
    assert (points[0][0], points[-1][0]) == (0, charts.WIDTH)
    assert all(0 <= y <= charts.HEIGHT for _, y in points)
    assert (line.first, line.last, line.latest) == ("1", "10000", "0")
    assert charts.line([(1, 2.0)]) is None


def test_amounts_are_compared_with_the_largest() -> None:
    bars = charts.compared({"GPU": (300.0, "300 J"), "CPU": (30.0, "30 J")})
    assert [(bar.name, bar.length) for bar in bars] == [("GPU", 100), ("CPU", 10)]
    assert charts.compared({"GPU": (0.0, "0 J")}) == []
