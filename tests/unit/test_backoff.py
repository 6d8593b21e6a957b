"""Waits between attempts: they grow, stay within their bounds, differ, and start again after a success."""

from __future__ import annotations

from flowmesh.backoff import Backoff


def test_each_wait_lies_between_half_of_its_step_and_all_of_it() -> None:
    for _ in range(200):
        backoff = Backoff(first_s=1.0, longest_s=5.0)
        for step_s in (1.0, 2.0, 4.0, 5.0, 5.0):
            assert step_s / 2 <= backoff.next_s() <= step_s


def test_waits_differ_from_node_to_node() -> None:
    assert len({Backoff().next_s() for _ in range(20)}) > 1


def test_a_success_starts_from_the_first_step() -> None:
    backoff = Backoff(first_s=1.0, longest_s=100.0)
    for _ in range(10):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_the_first_step_is_never_over_the_longest() -> None:
    assert Backoff(first_s=30.0, longest_s=2.0).next_s() <= 2.0
