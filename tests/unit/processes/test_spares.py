"""When a fork server forks its spare children."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flowmesh.processes import spares
from flowmesh.processes.spares import MANY, Spares


class Forked:
    """In place of a child: what Spares asks of one."""

    pid = 1

    def take(self, _request: Any, _data: bytes) -> Forked:
        return self

    def discard(self, *, reaped: bool = False) -> None:
        pass


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(spares, "time", found)
    return found


def made(awaited: Callable[[], bool] = lambda: False) -> Spares:
    return Spares(Forked, awaited)  # type: ignore[arg-type]


def number(of: Spares) -> int:
    return len(of._spares)


def give_all(of: Spares) -> None:
    for _ in range(number(of)):
        of.hand_out(None, b"")  # type: ignore[arg-type]


def test_the_last_task_that_ends_has_both_forked(clock: Clock) -> None:
    found = made()
    found.look(idle=True, quiet=False)
    assert number(found) == MANY
    give_all(found)
    found.look(idle=False, quiet=False)
    assert number(found) == 0
    found.look(idle=True, quiet=False)
    assert number(found) == MANY


def test_a_task_that_comes_meanwhile_goes_before_the_second_fork(clock: Clock) -> None:
    found = made(awaited=lambda: True)
    found.look(idle=True, quiet=False)
    assert number(found) == 1
    found.look(idle=True, quiet=False)
    assert number(found) == 1
    assert found.pause_s == spares.REST_S
    found.look(idle=True, quiet=True)
    assert number(found) == MANY


def test_while_tasks_run_they_are_forked_some_time_after_the_last_was_given_away(clock: Clock) -> None:
    found = made()
    found.look(idle=True, quiet=False)
    give_all(found)
    clock.now += spares.LATE_S / 2
    found.hand_out(None, b"")  # type: ignore[arg-type]
    assert found.pause_s == pytest.approx(spares.LATE_S / 2)
    found.look(idle=False, quiet=False)
    assert number(found) == 0
    clock.now += spares.LATE_S / 2
    found.look(idle=False, quiet=False)
    assert number(found) == MANY


def test_one_that_cannot_be_forked_is_tried_again_later(clock: Clock) -> None:
    fails = [True]

    def fork() -> Forked:
        if fails[0]:
            raise OSError
        return Forked()

    found = Spares(fork, lambda: False)  # type: ignore[arg-type]
    found.look(idle=True, quiet=True)
    fails[0] = False
    found.look(idle=True, quiet=True)
    assert number(found) == 0
    assert found.pause_s is None
    clock.now += spares.AGAIN_S
    found.look(idle=True, quiet=True)
    assert number(found) == MANY
