"""The table of faults: each is injected at a random moment of a task's life, and declares what verdicts may follow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.rig import Lost, Rig

KILLED = ("crash", "ok")
"""Verdicts of a task whose child was killed from outside; "ok" if it had ended before."""


@dataclass(frozen=True)
class Fault:
    name: str
    act: Callable[[Rig, random.Random], None]
    disk: str | None = None
    weight: int = 4
    """How often it is drawn, relative to the others."""
    sets_clock: bool = False
    long: bool = False
    """Whether it takes minutes: only in a long run, or where it is named."""
    network: bool = False
    """Whether it needs network namespaces."""


FAULTS: list[Fault] = []


def fault(
    name: str,
    *,
    disk: str | None = None,
    weight: int = 4,
    sets_clock: bool = False,
    long: bool = False,
    network: bool = False,
) -> Callable[[Callable[[Rig, random.Random], None]], None]:
    def add(act: Callable[[Rig, random.Random], None]) -> None:
        FAULTS.append(Fault(name, act, disk, weight, sets_clock, long, network))

    return add


def crashes(rig: Rig) -> None:
    """From here on a dispatch may be lost, an event may be sent twice, and a heartbeat may be late."""
    rig.expect_accepted, rig.may_repeat, rig.may_be_late = False, True, True


def orphans(rig: Rig) -> None:
    """Processes that a task left may be reparented to init.

    Without a cgroup, nothing then shows where a program belongs that was executed with an empty environment.
    """
    rig.tame = rig.status()["isolation"] == "subreaper"


def until(condition: Callable[[], object], what: str, deadline_s: float = 15.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise Lost(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(0.01)
