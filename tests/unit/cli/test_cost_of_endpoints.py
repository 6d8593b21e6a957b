"""`flowmesh cost` counts what tasks have paid to endpoints."""

from __future__ import annotations

from flowmesh.cli.cost import summed
from flowmesh.tasks.history import Entry


def test_what_endpoints_cost_is_part_of_the_total() -> None:
    entries = [
        Entry(task_id="a", type="api", verdict="ok", cost_usd=1.0, api_usd=0.5),
        Entry(task_id="b", type="api", verdict="error", api_usd=0.25),
        Entry(task_id="c", type="echo", verdict="ok", cost_usd=0.125),
    ]
    api, echo = summed(entries, "type", None)
    assert (api.of, api.api_usd, api.slot_usd, api.total_usd) == ("api", 0.75, 1.0, 1.75)
    assert (echo.api_usd, echo.total_usd) == (0.0, 0.125)
