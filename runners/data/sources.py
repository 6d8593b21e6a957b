"""`spec.data`: prompts with metadata from any source. The entry point of every runner that takes data."""

from __future__ import annotations

from typing import Any

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context
from runners.data.files import load_file
from runners.data.graph import load_graph
from runners.data.hub import load_hub
from runners.data.lists import load_list
from runners.data.prompts import Items, check_text
from runners.data.shard import Shard

LOADERS = {
    "list": load_list,
    "dataset": load_hub,
    "graph_template": load_graph,
    "jsonl": load_file,
    "csv": load_file,
    "parquet": load_file,
}


def load_items(ctx: Context, spec: dict[str, Any], where: str = "spec") -> Items:
    """The rows that `spec.data` and `spec.shard` select.

    Raises:
        BadRequest: naming the field.
        MissingDependency: the source needs a library that is not installed.
        RunnerError: the source cannot be reached.
    """
    section = spec.get("data")
    here = f"{where}.data"
    if not isinstance(section, dict):
        found = "missing" if section is None else f"expected a mapping (found {type(section).__name__})"
        raise BadRequest(f"{here}: {found}; give it a `type`: {', '.join(sorted(LOADERS))}")
    kind = section.get("type")
    if not isinstance(kind, str):
        raise BadRequest(f"{here}.type: missing; one of {', '.join(sorted(LOADERS))}")
    loader = LOADERS.get(kind)
    if loader is None:
        raise BadRequest(f"{here}.type: unknown source {kind!r}; {nearest(kind, list(LOADERS))}")
    shard = None if spec.get("shard") is None else ctx.check(spec["shard"], Shard, f"{where}.shard")
    if shard is not None:
        shard.check(f"{where}.shard")
    items = loader(ctx, section, shard, spec, here)
    for prompt, metadata, place in zip(items.prompts, items.metadata, items.wheres, strict=True):
        check_text([prompt, metadata], place)
    return items
