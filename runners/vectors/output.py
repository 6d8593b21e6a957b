"""The file of a task's vectors: `.npy`, parquet or JSONL, one row for each item, in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runners.api import Context
from runners.inference.export import check_path
from runners.vectors.part import Part
from runners.vectors.task import Vectors

FIELD = "vectors_file"
"""In the result."""


def write_vectors(ctx: Context, part: Part, wanted: Vectors, vectors: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Write the file below the part's folder, request its upload, and return the result's `vectors_file`.

    Args:
        vectors: items × dimension, in the precision that the file gets.
    """
    kind = wanted.format or "npy"
    relative = check_path(wanted.path or f"artifacts/vectors.{kind}", "spec.vectors.path")
    target = part.folder / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial")
    match kind:
        case "npy":
            with scratch.open("wb") as file:
                np.save(file, vectors, allow_pickle=False)
        case "parquet":
            _write_parquet(scratch, part, vectors, text=bool(wanted.text))
        case "jsonl":
            _write_jsonl(scratch, part, vectors, text=bool(wanted.text))
    scratch.rename(target)
    ctx.upload(relative, FIELD, part.task_id)
    return {
        "path": str(target), "worker_path": str(target), "relative_path": relative, "format": kind,
        "shape": list(vectors.shape), "dtype": str(vectors.dtype),
    }  # fmt: skip


def _write_jsonl(path: Path, part: Part, vectors: np.ndarray[Any, Any], *, text: bool) -> None:
    with path.open("wb") as file:
        for index, vector in enumerate(vectors):
            line: dict[str, Any] = {"index": index, "vector": vector.tolist()}
            if text:
                line["text"] = part.texts[index]
            if (metadata := part.items.metadata[index]) is not None:
                line["metadata"] = metadata
            file.write(msgspec.json.encode(line, enc_hook=str) + b"\n")


def _write_parquet(path: Path, part: Part, vectors: np.ndarray[Any, Any], *, text: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
    columns: dict[str, Any] = {
        "index": pyarrow.array(range(len(vectors)), pyarrow.int64()),
        "vector": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    if text:
        columns["text"] = pyarrow.array(part.texts, pyarrow.string())
    if any(each is not None for each in part.items.metadata):
        shown = [
            None if each is None else msgspec.json.encode(each, enc_hook=str).decode() for each in part.items.metadata
        ]
        columns["metadata"] = pyarrow.array(shown, pyarrow.string())  # rows may have different keys
    parquet.write_table(pyarrow.table(columns), path)
