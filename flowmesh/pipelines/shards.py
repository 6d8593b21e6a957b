"""`parallel`: a stage's shards, and their results as one, in the items' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowmesh.pipelines.fields import Parallel

LISTS = {"inference": "items", "rag": "queries", "agent": "items"}
"""By task type: the field of its result that has an entry a row. Others cannot be divided."""
_LONGEST = ("latency_sec", "execution_time_sec")
"""Of `usage`: shards run side by side, so these are not added."""


def shards_of(spec: dict[str, Any], parallel: Parallel, slots: int) -> list[dict[str, Any]]:
    """The specs of a stage's shards; one without `shard` where one is enough.

    Args:
        slots: how many tasks can run at once, which decides where `max_shards` is not given.
    """
    total = parallel.max_shards or max(1, slots)
    data = spec.get("data")
    if isinstance(data, dict) and isinstance(items := data.get("items"), list):
        total = min(total, max(1, len(items)))
    if total == 1:
        return [spec]
    contiguous = parallel.contiguous is not False
    return [{**spec, "shard": {"index": index, "total": total, "contiguous": contiguous}} for index in range(total)]


def merged(task_type: str, results: Sequence[dict[str, Any]], *, contiguous: bool) -> dict[str, Any]:
    """One result of a stage's shards, as if it had not been divided.

    Args:
        results: in the order of the shards.
        contiguous: as in the shards.
    """
    name = LISTS[task_type]
    lists: list[list[Any]] = [rows if isinstance(rows := result.get(name), list) else [] for result in results]
    rows = _in_order(lists, contiguous=contiguous)
    made: dict[str, Any] = {**results[0], name: [_numbered(row, index) for index, row in enumerate(rows)]}
    usages = [result["usage"] for result in results if isinstance(result.get("usage"), dict)]
    if usages:
        made["usage"] = _added(usages)
    if lines := [line for result in results for line in result.get("warnings") or ()]:
        made["warnings"] = list(dict.fromkeys(lines))
    made["shards"] = [{"index": index, "count": len(rows)} for index, rows in enumerate(lists)]
    return made


def _in_order(lists: list[list[Any]], *, contiguous: bool) -> list[Any]:
    if contiguous:
        return [row for rows in lists for row in rows]
    longest = max(map(len, lists), default=0)
    return [rows[index] for index in range(longest) for rows in lists if index < len(rows)]


def _numbered(row: Any, index: int) -> Any:
    return {**row, "index": index} if isinstance(row, dict) and "index" in row else row


def _added(usages: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            before = total.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(before, int | float):
                total.setdefault(name, value)
            else:
                total[name] = max(before, value) if name in _LONGEST else before + value
    return total
