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


def _three(
    draw: random.Random, new: float, *, turn: float, node: float
) -> tuple[list[float], list[float], list[float]]:
    """Values of new code and of two nodes of the old, 20 turns: what a turn and what a node varies by, as sigmas."""
    scales = [each * draw.lognormvariate(0, node) for each in (new, 1.0, 1.0)]
    news, olds, agains = ([scale * draw.lognormvariate(0, turn) for _ in range(20)] for scale in scales)
    return news, olds, agains


def test_a_regression_shows_on_a_machine_whose_values_vary_by_half() -> None:
    draw = random.Random(11)
    assert sum(regresses(*_three(draw, 2.0, turn=0.35, node=0.05)) for _ in range(200)) > 180
    assert sum(regresses(*_three(draw, 1.2, turn=0.05, node=0.02)) for _ in range(200)) > 190


def test_the_same_code_is_seldom_a_regression_and_hardly_ever_twice() -> None:
    draw = random.Random(12)
    for turn, node in ((0.05, 0.0), (0.35, 0.05), (0.02, 0.1)):
        found = [regresses(*_three(draw, 1.0, turn=turn, node=node)) for _ in range(400)]
        assert sum(found) < 100
        assert sum(one and other for one, other in zip(found[::2], found[1::2], strict=True)) < 20


def test_one_slow_node_of_the_old_code_hides_nothing_and_blames_nobody() -> None:
    flat = [1.0] * 20
    assert regresses([1.5] * 20, flat, [1.1] * 20)
    assert not regresses([1.15] * 20, flat, [1.1] * 20)
    assert not regresses([1.1] * 20, [1.1] * 20, flat)
    assert not regresses([1.1] * 20, flat, [1.1] * 20)
    assert not regresses([0.5] * 20, flat, flat)


def test_who_is_first_changes_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def called(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn([lambda: called("new"), lambda: called("old"), lambda: called("again")], 2)
    assert order == ["new", "old", "again", "old", "again", "new", "again", "new", "old"]
    assert found == [[6.0, 8.0], [4.0, 9.0], [5.0, 7.0]]
