"""What a rag task can do before it has its slot; see `Runner.ahead`."""

from __future__ import annotations

from pathlib import Path

from runners.api import Context, Preparation
from runners.data.sources import files_ahead
from runners.embedding.embedder import WHERE
from runners.embedding.load import embedding_source
from runners.embedding.options import DEFAULT_MODEL
from runners.inference.task_model import parts_ahead as of_model
from runners.models.sources import local_path
from runners.rag.task import Faiss, RagTask


def parts_ahead(ctx: Context, task: RagTask) -> list[Preparation]:
    """The model for its queries, its index, its queries, and the model that answers."""
    options = task.embedding
    parts: list[Preparation] = [
        lambda: embedding_source(ctx, options.model or DEFAULT_MODEL, options.revision, WHERE).folders,
        lambda: _passages(ctx, task.faiss),
        lambda: files_ahead(ctx, ctx.spec),
    ]
    return parts if task.generation is None else [*parts, *of_model(ctx, task.generation.inference)]


def _passages(ctx: Context, faiss: Faiss | None) -> list[Path]:
    """The folder of an index, or of documents."""
    if faiss is None:
        return []
    if faiss.index is not None:
        from runners.rag.store import locate

        return [locate(ctx, faiss.index, "spec.faiss.index")]
    return [] if faiss.path is None else [local_path(ctx, faiss.path, "spec.faiss.path")]
