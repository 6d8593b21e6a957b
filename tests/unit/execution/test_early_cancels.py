"""Cancels that came before their tasks, at any age of the machine."""

from __future__ import annotations

import pytest

from flowmesh.execution import early_cancels
from flowmesh.execution.early_cancels import KEPT_S, EarlyCancels


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("uptime_s", [0.0, 5.0, KEPT_S - 1, 1e7])
def test_only_what_was_cancelled_is(uptime_s: float) -> None:
    """The monotonic clock begins at zero when the machine does."""
    cancels = EarlyCancels(Clock(uptime_s))
    cancels.add("cancelled")
    assert not cancels.take("another")
    assert cancels.take("cancelled")
    assert not cancels.take("cancelled")


def test_forgotten_in_time() -> None:
    clock = Clock(3.0)
    cancels = EarlyCancels(clock)
    cancels.add("old")
    clock.now += KEPT_S + 1
    assert not cancels.take("old")
    cancels.add("old")
    clock.now += KEPT_S + 1
    cancels.add("new")
    assert len(cancels) == 1


def test_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_cancels, "KEPT_MOST", 3)
    cancels = EarlyCancels(Clock(1.0))
    for number in range(10):
        cancels.add(f"task-{number}")
    cancels.add("task-7")
    assert len(cancels) == 3
    assert [cancels.take(f"task-{number}") for number in (6, 7, 8, 9)] == [False, True, True, True]
