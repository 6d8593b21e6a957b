"""What a node believes of the numbers that a task's process reports of its served model."""

from __future__ import annotations

import math

from flowmesh.messages.serving import BOUNDS, believed

WHOLE = (1.0,) * (len(BOUNDS) + 2)


def test_only_known_names_with_possible_values_are_taken() -> None:
    given = {
        "requests": 3, "failed": math.nan, "running": -1, "waiting": math.inf, "tokens\n1": 1, "kv_cache_usage": 0.5,
        "restarts": 1e300,
    }  # fmt: skip
    times = {"first_token": WHOLE, "request": WHOLE[:-1], "other": WHOLE}
    found = believed(given, times)
    assert found.values == {"requests": 3, "kv_cache_usage": 0.5}
    assert found.times == {"first_token": WHOLE}
    assert believed({}, {"request": (math.nan, *WHOLE[1:])}).times == {}
