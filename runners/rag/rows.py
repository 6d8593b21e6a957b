"""The rows of a rag task: one for each query, with its passages and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages.rows import Row
from runners.api import Context
from runners.rag.search import Hit
from runners.rows.keys import key_of
from runners.rows.log import RowLog
from runners.rows.opening import open_rows

FIELD = "queries"
"""The list in the result that holds the items."""


class Queries(msgspec.Struct, frozen=True):
    """One task's queries."""

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any] | None, ...]
    wheres: tuple[str, ...]
    system_prompt: str | None


class Found(msgspec.Struct, frozen=True):
    """What the search gave for one query."""

    hits: Sequence[Hit]
    marks: Mapping[str, bool]
    """Flags of its entry: truncated, zero_vector, fewer_than_top_k."""


def row_keys(queries: Queries, retrieval: Sequence[str], answering: str | None) -> list[str]:
    """The key of each query's row.

    Args:
        retrieval: of each query, the digest of what its passages depend on, or of the passages themselves. Empty: not
            known, and each attempt searches again.
        answering: digest of what answers; None: the task only searches.
    """
    return [
        key_of("rag", text, queries.system_prompt, each, answering) if each else ""
        for text, each in zip(queries.texts, retrieval, strict=True)
    ]


def passages_digest(found: Found) -> str:
    """Of what an answer depends on. Scores vary in their last digits with the batch that a query is searched in."""
    return key_of([(hit.id, hit.payload) for hit in found.hits])


def entry_of(queries: Queries, index: int, found: Found) -> dict[str, Any]:
    """A query's entry in the result, without its answer."""
    metadata = queries.metadata[index]
    return {
        "index": index,
        "query": queries.texts[index],
        "items": [{"id": hit.id, "score": hit.score, "payload": hit.payload} for hit in found.hits],
        **({} if metadata is None else {"metadata": metadata}),
        **found.marks,
    }


def open_log(  # noqa: PLR0917
    ctx: Context, spec: dict[str, Any], where: str, folder: Path, queries: Queries, keys: Sequence[str], task_id: str
) -> RowLog:
    """See `open_rows`."""

    def place(index: int, row: Row) -> dict[str, Any]:
        metadata = queries.metadata[index]
        kept = {name: value for name, value in row.item.items() if name not in ("index", "metadata")}
        return {"index": index, **kept, **({} if metadata is None else {"metadata": metadata})}

    return open_rows(ctx, spec, where, folder, keys, place, task_id=task_id, field=FIELD)


def usage(rows: Iterable[Row], search_s: float, answer_s: float, *, answers: bool) -> dict[str, Any]:
    """`usage` of the result.

    Args:
        answers: whether the task generates.
    """
    rows = list(rows)
    found: dict[str, Any] = {
        "latency_sec": round(search_s + answer_s, 6),
        "num_queries": len(rows),
        "total_results": sum(len(row.item["items"]) for row in rows),
    }
    if answers:
        prompt, completion = (
            sum(getattr(row, name) for row in rows) for name in ("prompt_tokens", "completion_tokens")
        )
        found |= {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        found |= {"search_sec": round(search_s, 6), "generate_sec": round(answer_s, 6)}
    return found
