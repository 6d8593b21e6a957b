"""How a document names the model that another task serves, and where that is: `task:ID` in place of an address."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from flowmesh.messages.wire import usable_task_id

PREFIX = "task:"
COUNTS = ("requests", "failed", "prompt_tokens", "completion_tokens", "restarts")
"""What a served model counts: numbers that only rise."""
GAUGES = ("running", "waiting", "kv_cache_usage")
"""What it has now. `kv_cache_usage` is the used part of it, from 0 to 1."""
TIMES = ("first_token", "request")
"""What it times: counts by bucket, of BOUNDS and without a bound, and the sum."""
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds."""
MOST = 1e15
"""No number is larger."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task serves a model, with its key."""

    task_id: str
    base_url: str
    model: str
    """The name that requests give it."""
    api_key: str
    own: bool = False
    """Whether the task runs on the node that says so; else the address is what Redis has."""

    def __repr__(self) -> str:
        return f"Served({self.task_id!r}, {self.base_url!r}, {self.model!r})"


class Numbers(msgspec.Struct, frozen=True):
    """What is believed of the numbers that a task's child reports."""

    values: dict[str, float] = {}
    times: dict[str, tuple[float, ...]] = {}


def believed(values: Mapping[str, float], times: Mapping[str, Sequence[float]]) -> Numbers:
    """Known names with values from 0 to MOST; the rest is left out."""
    return Numbers(
        {name: values[name] for name in (*COUNTS, *GAUGES) if name in values and _fits(values[name])},
        {
            name: tuple(times[name])
            for name in TIMES
            if name in times and len(times[name]) == len(BOUNDS) + 2 and all(map(_fits, times[name]))
        },
    )


def _fits(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= MOST


def names_task(address: str) -> bool:
    """Whether an address names a task, well or badly."""
    return address.startswith(PREFIX)


def task_of(address: str) -> str | None:
    """The id of the task that an address names; None: it names none."""
    return usable_task_id(address.removeprefix(PREFIX)) if names_task(address) else None
