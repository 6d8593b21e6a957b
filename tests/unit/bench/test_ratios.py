"""Ratios of pairs, slopes, and what counts as a regression."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.against import in_turn
from tests.bench.ratios import Ratio, ratio, regresses, slope


def test_one_disturbed_pair_moves_nothing() -> None:
    ours, others = [2.0] * 20, [1.0] * 20
    ours[7] = 500.0
    assert ratio(ours, others) == Ratio(2.0, 2.0, 2.0, 20)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=60))
def test_the_interval_holds_the_median(values: list[float]) -> None:
    found = ratio(values, [1.0] * len(values))
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


def test_the_interval_has_the_true_ratio_in_it_about_as_often_as_it_says() -> None:
    draw = random.Random(7)

    def holds() -> bool:
        found = ratio([draw.lognormvariate(0, 0.3) for _ in range(20)], [1.0] * 20)
        return found.low <= 1.0 <= found.high

    assert sum(holds() for _ in range(400)) > 370


def test_nothing_to_divide_by_is_an_error() -> None:
    with pytest.raises(ValueError, match="above 0"):
        ratio([1.0], [0.0])


def test_a_slope_and_its_uncertainty() -> None:
    draw = random.Random(3)
    steps = [float(250 * number) for number in range(80)]
    flat = slope(steps, [36e6 + draw.gauss(0, 1e5) for _ in steps])
    leaks = slope(steps, [36e6 + 40 * at + draw.gauss(0, 1e5) for at in steps])
    assert not flat.grows
    assert leaks.grows
    assert abs(leaks.per_step - 40) < 3 * leaks.error + 5
    with pytest.raises(ValueError, match="three"):
        slope([1.0, 1.0, 2.0], [0.0, 0.0, 0.0])


def test_a_regression_is_beyond_the_machines_noise() -> None:
    assert regresses(Ratio(1.3, 1.2, 1.4, 20), noise=Ratio(1.0, 0.95, 1.05, 20))
    assert not regresses(Ratio(1.3, 1.2, 1.4, 20), noise=Ratio(1.1, 0.9, 1.25, 20))
    assert not regresses(Ratio(1.05, 0.98, 1.1, 20), noise=Ratio(1.0, 0.95, 0.97, 20))


def test_who_is_first_changes_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def called(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn([lambda: called("new"), lambda: called("old"), lambda: called("again")], 2)
    assert order == ["new", "old", "again", "old", "again", "new", "again", "new", "old"]
    assert found == [[6.0, 8.0], [4.0, 9.0], [5.0, 7.0]]
