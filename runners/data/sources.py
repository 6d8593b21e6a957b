"""`spec.data`: prompts with metadata from any source. The entry point of every runner that takes data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context
from runners.data.files import FileData, files_of, load_file
from runners.data.graph import GraphData, load_graph
from runners.data.hub import HubData, load_hub
from runners.data.images import check_images, refuse_images
from runners.data.lists import ListData, load_list
from runners.data.prompts import Items, check_text
from runners.data.shard import Shard
from runners.fields import Faults

LOADERS = {
    "list": load_list,
    "dataset": load_hub,
    "graph_template": load_graph,
    "jsonl": load_file,
    "csv": load_file,
    "parquet": load_file,
}


SECTIONS: dict[str, type[Any]] = {
    "list": ListData,
    "dataset": HubData,
    "graph_template": GraphData,
    "jsonl": FileData,
    "csv": FileData,
    "parquet": FileData,
}
"""The fields of each source."""


def check_data(
    ctx: Context, spec: dict[str, Any], where: str = "spec", *, sources: Mapping[str, type[Any]] = SECTIONS
) -> str:
    """Check the fields of `spec.data` and `spec.shard`, without reading a row; returns the source's type.

    Args:
        sources: those that the task type has, by their type.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    section = spec.get("data")
    here = f"{where}.data"
    if not isinstance(section, dict):
        found = "missing" if section is None else f"expected a mapping (found {type(section).__name__})"
        raise BadRequest(f"{here}: {found}; give it a `type`: {', '.join(sorted(sources))}")
    kind = section.get("type")
    if not isinstance(kind, str):
        raise BadRequest(f"{here}.type: missing; one of {', '.join(sorted(sources))}")
    if kind not in sources:
        raise BadRequest(f"{here}.type: unknown source {kind!r}; {nearest(kind, list(sources))}")
    faults = Faults()
    faults.read(lambda: ctx.check(section, sources[kind], here))
    faults.read(lambda: _shard(ctx, spec, where))
    faults.check()
    return kind


def load_items(ctx: Context, spec: dict[str, Any], where: str = "spec", *, with_images: bool = False) -> Items:
    """The rows that `spec.data` and `spec.shard` select.

    Args:
        with_images: images in chat messages are read and checked; else they are refused.

    Raises:
        BadRequest: naming the field.
        MissingDependency: the source needs a library that is not installed.
        RunnerError: the source cannot be reached.
    """
    kind = check_data(ctx, spec, where)
    items = LOADERS[kind](ctx, spec["data"], _shard(ctx, spec, where), spec, f"{where}.data")
    for prompt, metadata, place in zip(items.prompts, items.metadata, items.wheres, strict=True):
        check_text([prompt, metadata], place)
    if with_images:
        return check_images(ctx, items)
    refuse_images(items)
    return items


def files_ahead(ctx: Context, spec: dict[str, Any], where: str = "spec") -> list[Path]:
    """The files of `spec.data`, for `Runner.ahead`; empty where it names none. Errors as for `files.files_of`."""
    section = spec.get("data")
    if not isinstance(section, dict) or SECTIONS.get(section.get("type", "")) is not FileData:
        return []
    data = ctx.check(section, FileData, f"{where}.data")
    return [file.path for file in files_of(ctx, data, f"{where}.data")]


def _shard(ctx: Context, spec: dict[str, Any], where: str) -> Shard | None:
    if spec.get("shard") is None:
        return None
    shard = ctx.check(spec["shard"], Shard, f"{where}.shard")
    shard.check(f"{where}.shard")
    return shard
