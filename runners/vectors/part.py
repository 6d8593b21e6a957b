"""One task's items and their rows. Each merged task has one part."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flowmesh.messages.rows import Row
from runners.api import BadRequest, Context
from runners.data.prompts import Items
from runners.data.sources import load_items
from runners.embedding.embedder import Vectors
from runners.rag.documents import text_of
from runners.rows.keys import key_of
from runners.rows.log import RowLog
from runners.rows.opening import open_rows
from runners.vectors.task import EmbeddingTask

VECTOR = "vector"
"""In a row: little-endian float32, in base64."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One task's texts and options."""

    task_id: str | None
    """None: the parent, into which the others were merged."""
    folder: Path
    task: EmbeddingTask
    items: Items
    texts: tuple[str, ...]


class Finished:
    """The rows of a part: their vectors in an array, everything else as the result has it."""

    def __init__(self, part: Part, log: RowLog) -> None:
        self.part = part
        self.log = log
        self._vectors: Vectors | None = None
        for index, row in log.rows.items():
            self._place(index, row)

    def add(self, index: int, vector: np.ndarray[Any, Any], tokens: int, marks: dict[str, Any]) -> None:
        """Write one item's row."""
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        item = {**_entry(self.part, index), "tokens": tokens, **marks, VECTOR: encoded}
        self._place(index, self.log.add(index, item, prompt_tokens=tokens))

    @property
    def vectors(self) -> Vectors:
        """One row for each item, in order. All rows must stand."""
        assert self._vectors is not None, "a task has items"
        return self._vectors

    def _place(self, index: int, row: Row) -> None:
        vector = decoded(row)
        assert vector is not None, "checked when it was taken"
        if self._vectors is None:
            self._vectors = np.zeros((len(self.part.texts), len(vector)), dtype=np.float32)
        self._vectors[index] = vector
        item = {name: value for name, value in row.item.items() if name != VECTOR}
        self.log.rows[index] = msgspec.structs.replace(row, item=item)


def read_part(
    ctx: Context, task: EmbeddingTask, spec: dict[str, Any], where: str, *, task_id: str | None, folder: Path
) -> Part:
    """A task's part of the batch.

    Raises:
        BadRequest: names the field or the item.
    """
    items = load_items(ctx, spec, where)
    texts = tuple(text_of(prompt, place) for prompt, place in zip(items.prompts, items.wheres, strict=True))
    part = Part(task_id=task_id, folder=folder, task=task, items=items, texts=texts)
    if not texts:
        raise BadRequest(f"{where}.data: has no items")
    if not any(text.strip() for text in texts):
        raise BadRequest(f"{items.wheres[0]}: blank, and so are all other texts; there is nothing to embed")
    return part


def open_log(ctx: Context, part: Part, model: str, spec: dict[str, Any], where: str) -> RowLog:
    """The part's row log, with the rows that stand already.

    Args:
        model: digest of what the vectors of a text depend on.

    Raises:
        BadRequest: `resume` names no rows.
    """

    def place(index: int, row: Row) -> dict[str, Any]:
        kept = {name: value for name, value in row.item.items() if name not in ("index", "metadata")}
        return {**_entry(part, index), **kept}

    keys = [key_of("embedding", text, model) for text in part.texts]
    dimensions: set[int] = set()

    def stands(_: int, row: Row) -> bool:
        vector = decoded(row)
        if vector is None:
            return False
        dimensions.add(len(vector))
        return len(dimensions) == 1

    task_id = part.task_id or ctx.task_id
    return open_rows(ctx, spec, where, part.folder, keys, place, task_id=task_id, stands=stands)


def decoded(row: Row) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """A row's vector; None where it has none."""
    try:
        data = base64.b64decode(row.item.get(VECTOR, ""), validate=True)
    except (binascii.Error, TypeError, ValueError):
        return None
    vector = np.frombuffer(data, dtype="<f4") if data and len(data) % 4 == 0 else None
    return vector if vector is not None and np.isfinite(vector).all() else None


def counts_of(items: Sequence[dict[str, Any]], most: int) -> dict[str, Any]:
    """What a result says of unusual items: how many, and which, `most` at most."""
    found: dict[str, Any] = {}
    for mark in ("truncated", "blank", "zero_vector"):
        marked = [item["index"] for item in items if item.get(mark)]
        if marked:
            found[mark] = {"count": len(marked), "items": marked[:most]}
    return found


def _entry(part: Part, index: int) -> dict[str, Any]:
    metadata = part.items.metadata[index]
    return {
        "index": index,
        **({} if metadata is None else {"metadata": metadata}),
        **({} if part.texts[index].strip() else {"blank": True}),
    }
