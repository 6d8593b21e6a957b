"""An item of a score task's result: a pair's score, or a query's documents in the order of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runners.scoring.task import Group, ScoreOptions


def item_of(index: int, group: Group, rows: Sequence[dict[str, Any]], options: ScoreOptions) -> dict[str, Any]:
    """
    Args:
        rows: of the group's documents, in their order.
    """
    item: dict[str, Any] = {"index": index}
    if group.is_pair:
        item |= _shown(rows[0])
    else:
        ranked = sorted(rows, key=lambda row: (-row["score"], row["document"]))  # equal scores: as they were given
        item["query"] = group.query
        item["results"] = [_place(group, row, options) for row in ranked[: options.top_n]]
    return item if group.metadata is None else {**item, "metadata": group.metadata}


def _place(group: Group, row: dict[str, Any], options: ScoreOptions) -> dict[str, Any]:
    number = row["document"]
    found = {"index": number, **_shown(row)}
    if options.return_documents is not False:
        found["document"] = group.documents[number]
    if group.of_documents and group.of_documents[number] is not None:
        found["metadata"] = group.of_documents[number]
    return found


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("score", "tokens", "truncated", "tokens_given") if name in row}
