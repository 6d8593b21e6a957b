"""A line's row in the row log: its line of `output.jsonl` or `errors.jsonl`, which stays in the file only."""

from __future__ import annotations

from typing import Any

import msgspec

from flowmesh.messages.rows import Row
from runners.rows.log import RowLog


class Answered(msgspec.Struct, frozen=True):
    """What answering the lines of a batch came to."""

    latency_s: float
    fields: dict[str, Any] = {}
    """More of the task's result."""


def add_line(log: RowLog, index: int, item: dict[str, Any], **fields: Any) -> None:
    """As `RowLog.add`; the item is not kept in memory."""
    log.rows[index] = lean(log.add(index, item, **fields))


def lean(row: Row) -> Row:
    """A row whose answer is in the file only."""
    return msgspec.structs.replace(row, item={})
