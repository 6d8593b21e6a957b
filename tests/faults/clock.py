"""The machine's clock is set."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.faults.delivery import deliver
from tests.faults.rig import Lost, Rig
from tests.faults.table import crashes, fault, until

SLOW_S = 12.0
"""What a busy machine, a restart and the escalation's steps may add to a time limit. Clocks are set by more."""


@fault("clock: set by hours while tasks run", weight=8, sets_clock=True)
def _(rig: Rig, rng: random.Random) -> None:
    """Time limits, heartbeats and reported runtimes do not change."""
    _timed(rig, rng, lambda: _set_again_and_again(rig, rng))


@fault("clock: set by hours while no supervisor lives", weight=8, sets_clock=True)
def _(rig: Rig, rng: random.Random) -> None:
    crashes(rig)

    def restart() -> None:
        rig.node.kill()
        rig.set_clock(rng)
        rig.start_node()
        rig.listen(rng)

    _timed(rig, rng, restart)


@fault("clock: set by hours between deliveries", sets_clock=True)
def _(rig: Rig, rng: random.Random) -> None:
    deliver(rig)
    rig.delivery_child()
    _set_again_and_again(rig, rng)


def _set_again_and_again(rig: Rig, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 5)):
        rig.listen(rng)
        rig.set_clock(rng)


def _timed(rig: Rig, rng: random.Random, act: Callable[[], None]) -> None:
    """Call `act` while a task runs. Its time limit and its runtime must be right all the same."""
    limit_s = rng.uniform(1.5, 4.0)
    began = time.monotonic()
    if rng.random() < 0.5:
        task_id = rig.do("deaf", "timeout", timeoutSec=limit_s)
    else:
        task_id = rig.dispatch({"taskType": "echo", "delaySec": rng.uniform(0.3, 2.0), "timeoutSec": 30})
    until(lambda: rig.child(task_id), "the task is running")
    rig.listen(rng)
    act()
    end = rig.peer.wait_end(task_id)
    took_s, reported_s = time.monotonic() - began, end["payload"]["runtime_sec"]
    if not 0.0 < reported_s <= took_s:
        raise Lost(f"{task_id} reports a runtime of {reported_s} s, but ended {took_s:.2f} s after its dispatch")
    if rig.tasks[task_id] == {"timeout"} and not limit_s <= reported_s <= limit_s + SLOW_S:
        raise Lost(f"{task_id} timed out after {reported_s:.2f} s; its limit is {limit_s:.2f} s")
