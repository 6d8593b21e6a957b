"""Merged rag tasks: their queries are searched and answered together with the parent's."""

from __future__ import annotations

from typing import Any

import msgspec

from runners.api import BadRequest
from runners.rag.task import RagTask


def check_agreement(parent: RagTask, child: RagTask, where: str) -> None:
    """Raises BadRequest, naming the section, if a child searches or answers differently from its parent."""
    for section, field in (
        ("embedding", "embedding"),
        ("search.top_k", "top_k"),
        ("faiss", "faiss"),
        ("qdrant", "qdrant"),
        ("generate", "generation"),
    ):
        mine, theirs = getattr(child, field), getattr(parent, field)
        if mine == theirs:
            continue
        name = _first_difference(mine, theirs)
        raise BadRequest(f"{where}.{section}{name}: differs from the task that it is merged into; send it by itself")


def failed(error: Exception) -> dict[str, Any]:
    """The entry of a child that did not run."""
    return {
        "ok": False,
        "executor": "rag",
        "error": str(error),
        "queries": [],
        "usage": {"latency_sec": 0.0, "num_queries": 0, "total_results": 0},
    }


def _first_difference(one: Any, other: Any) -> str:
    """The first field that two structs do not share, dotted; empty where one is missing altogether."""
    if isinstance(one, msgspec.Struct) and type(one) is type(other):
        for name in one.__struct_fields__:
            if getattr(one, name) != getattr(other, name):
                return f".{name}" if name != "inference" else ""
    return ""
