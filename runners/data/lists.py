"""`data.type: list`: prompts in the document itself."""

from __future__ import annotations

from typing import Any

import msgspec

from runners.api import BadRequest, Context
from runners.data.prompts import Items, check_prompt
from runners.data.shard import Shard

Metadata = tuple[dict[str, Any] | None, ...]


class ListData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """spec.data of type list"""

    type: str
    items: list[Any] | None = None
    metadata: Metadata | None = None
    items_metadata: Metadata | None = None
    """The same as `metadata`."""


def load_list(ctx: Context, section: dict[str, Any], shard: Shard | None, spec: dict[str, Any], where: str) -> Items:  # noqa: ARG001
    """See `sources.load_items`."""
    data = ctx.check(section, ListData, where)
    if not data.items:
        raise BadRequest(f"{where}.items: {'missing' if data.items is None else 'empty'}; give at least one prompt")
    if data.metadata is not None and data.items_metadata is not None:
        raise BadRequest(f"{where}.items_metadata: means the same as {where}.metadata; give one of them")
    field = "metadata" if data.metadata is not None else "items_metadata"
    metadata = data.metadata if data.metadata is not None else data.items_metadata
    if metadata is not None and len(metadata) != len(data.items):
        raise BadRequest(
            f"{where}.{field}: {len(metadata)} mappings for {len(data.items)} items; "
            "give one for each item, null for none"
        )
    prompts = [check_prompt(ctx, item, f"{where}.items[{i}]", allow_empty=False) for i, item in enumerate(data.items)]
    rows = shard.rows(len(prompts)) if shard is not None else range(len(prompts))
    return Items(
        prompts=tuple(prompts[i] for i in rows),
        metadata=tuple(metadata[i] if metadata is not None else None for i in rows),
        wheres=tuple(f"{where}.items[{i}]" for i in rows),
    )
