"""The steps, in the order in which they run. Each is a module here with a function `run`."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

from tests.gpu.kit.budget import Share


@dataclass(frozen=True)
class Step:
    share: Share
    target: str
    """`module:function`, which gets the scene."""


def _step(name: str, priority: int, most_s: float, least_s: float) -> Step:
    share = Share(name=name, priority=priority, most_s=most_s, least_s=least_s)
    return Step(share, f"{__name__}.{name.replace('-', '_')}:run")


STEPS = (
    _step("hardware", 1, 15, 3),
    _step("fork-servers", 1, 60, 15),
    _step("release", 1, 80, 20),
    _step("faults", 1, 60, 20),
    _step("foreign", 2, 25, 10),
    _step("energy", 2, 75, 15),
    _step("heartbeats", 2, 20, 8),
    _step("gap", 3, 30, 10),
    _step("floors", 3, 90, 20),
    _step("inference", 3, 60, 15),
    _step("training", 3, 70, 20),
    _step("slots", 2, 30, 8),
    _step("suite", 2, 120, 20),
)
MORE = "FLOWMESH_GPU_CHECK_STEPS"
"""A module whose STEPS are added: for the tests of the kit itself."""


def table() -> dict[str, Step]:
    more = importlib.import_module(os.environ[MORE]).STEPS if os.environ.get(MORE) else ()
    return {step.share.name: step for step in (*STEPS, *more)}
