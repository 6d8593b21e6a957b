"""`spec.faiss` and `spec.qdrant` of an embedding task: an index that `rag` loads, and points in a collection."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import numpy as np

from runners.api import BadRequest, Context
from runners.embedding.embedder import Vectors
from runners.embedding.load import model_digest
from runners.models.sources import Source
from runners.rag.documents import Passage, id_of
from runners.vectors.part import Part
from runners.vectors.task import Collection, Index

POINTS_A_REQUEST = 256


def passages(part: Part) -> list[Passage]:
    """The items as passages of `rag`: the id in an item's metadata, else its number as text.

    Raises:
        BadRequest: two items have the same id.
    """
    found: list[Passage] = []
    seen: dict[str, str] = {}
    rows = zip(part.texts, part.items.metadata, part.items.wheres, strict=True)
    for index, (text, metadata, where) in enumerate(rows):
        name = id_of(metadata, index, where)
        if str(name) in seen:
            raise BadRequest(f"{where}: its id {name!r} is also that of {seen[str(name)]}; ids in metadata must differ")
        seen[str(name)] = where
        found.append(Passage(name, text, name, 0, metadata))
    return found


def build_index(  # noqa: PLR0917
    ctx: Context, part: Part, wanted: Index, vectors: Vectors, source: Source, max_tokens: int | None
) -> dict[str, Any]:
    """Write `faiss_index/` into the task's folder, as `rag` with `faiss.save` does; returns the result's `faiss`.

    Vectors of zeros, which have no direction, are left out.

    Raises:
        BadRequest: all vectors are zeros, or more cells than vectors.
        Cancelled: the node asked the task to stop.
    """
    from runners.rag import store
    from runners.rag.faiss_index import build
    from runners.rag.task import Faiss

    kept = np.flatnonzero(vectors.any(axis=1))
    if not kept.size:
        raise BadRequest(f"spec.faiss: {source.shown!r} gives a vector of zeros for every item")
    all_passages = passages(part)
    index = build(ctx, vectors[kept], Faiss(**msgspec.structs.asdict(wanted)))
    about = store.About(
        version=store.VERSION, recipe=index.recipe, embedding_model=source.shown,
        embedding_weights=model_digest(source), count=index.count, chunk_tokens=max_tokens or 0, chunk_overlap=0,
    )  # fmt: skip
    chosen = store.Passages.of([all_passages[row] for row in kept])
    folder = store.save(ctx, store.Loaded(index, chosen, about, None), part.folder)
    recipe = {name: value for name, value in msgspec.to_builtins(index.recipe).items() if value is not None}
    return {**recipe, "count": index.count, "skipped": len(vectors) - index.count, "index_path": str(folder)}


def store_points(ctx: Context, part: Part, wanted: Collection, vectors: Vectors) -> dict[str, Any]:
    """Write the items into the collection; the same items again replace their points. Returns the result's `qdrant`.

    Raises:
        BadRequest: the server refuses us, or the collection's vectors are others.
        RunnerError: it does not answer.
        Cancelled: the node asked the task to stop.
    """
    from qdrant_client import models

    from runners.rag.qdrant_search import open_qdrant

    client = open_qdrant(ctx, wanted)
    distance = getattr(models.Distance, (wanted.distance or "cosine").upper())
    client.open_or_create(ctx, vectors.shape[1], distance, given=wanted.distance is not None)
    task_id = part.task_id or ctx.task_id
    found = passages(part)
    for first in range(0, len(found), POINTS_A_REQUEST):
        ctx.progress(first, len(found), "points")
        points = [
            client.point(point_id(each.id, task_id, given=_has_id(each)), vector, payload(each))
            for each, vector in zip(
                found[first : first + POINTS_A_REQUEST], vectors[first : first + POINTS_A_REQUEST].tolist(), strict=True
            )
        ]
        client.upsert(ctx, points)
    return {**client.describe(), "written": len(found)}


def point_id(name: str | int, task_id: str, *, given: bool) -> str | int:
    """Qdrant's ids are integers or UUIDs: of another text, a UUID made from it; without one, from the task's id too."""
    if not given:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{task_id}\0{name}"))
    if isinstance(name, int):
        return name if 0 <= name < 1 << 64 else str(uuid.uuid5(uuid.NAMESPACE_OID, str(name)))
    try:
        return str(uuid.UUID(name))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def payload(passage: Passage) -> dict[str, Any]:
    """As a hit of `rag` has it."""
    shown: dict[str, Any] = msgspec.to_builtins(passage, enc_hook=str)
    shown.pop("id")
    if shown["metadata"] is None:
        shown.pop("metadata")
    return shown


def _has_id(passage: Passage) -> bool:
    return (passage.metadata or {}).get("id") is not None
