"""Rows of a training task that lie on this node: in its document, or in local files."""

from __future__ import annotations

from collections.abc import Iterator

from runners.data.local import Part, Table
from runners.data.readers import File, Row
from runners.data.reading import Reach
from runners.training.inputs import JsonlFile
from runners.training.plan import Plan


class LocalRows:
    """Rows that are in the task itself or in files of this node. May be iterated more than once."""

    def __init__(self, plan: Plan, jsonl: JsonlFile | None, table: Table | None, reach: Reach) -> None:
        self._plan = plan
        self._table = table
        if jsonl is not None:
            self._table = Table([Part((File(path=jsonl.path, format="jsonl", where=jsonl.name, reach=reach),))])
        self.is_arrow = table is not None and table.is_typed
        self.columns = plan.data.columns(jsonl=jsonl is not None)

    def __iter__(self) -> Iterator[Row]:
        return inline_rows(self._plan) if self._table is None else self._table.rows()

    def count(self) -> int:
        return sum(1 for _ in self) if self._table is None else self._table.count()

    def chosen(self) -> tuple[range | None, dict[str, int]]:
        """The numbers of this task's rows, where they are not all; and how many are left out."""
        if self._plan.data.max_samples is None and self._plan.shard is None:
            return None, {}
        count = self.count()
        return chosen_rows(self._plan, count), beyond(self._plan, count)


def chosen_rows(plan: Plan, count: int) -> range:
    """The rows, of `count`, that are this task's."""
    if plan.data.max_samples is not None:
        count = min(plan.data.max_samples, count)
    return range(count) if plan.shard is None else plan.shard.rows(count)


def beyond(plan: Plan, count: int) -> dict[str, int]:
    """The rows that `max_samples` leaves out, by their reason."""
    limit = plan.data.max_samples
    return {} if limit is None or count <= limit else {"beyond spec.data.max_samples": count - limit}


def inline_rows(plan: Plan) -> Iterator[Row]:
    """The rows that stand in the task itself, each with its dotted place."""
    assert plan.data.inline is not None
    name, rows = plan.data.inline
    for i, row in enumerate(rows):
        yield f"spec.data.{name}[{i}]", row
