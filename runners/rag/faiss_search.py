"""`spec.faiss`: an index from documents or from an earlier task, and the passages nearest to each query."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from runners.api import BadRequest, Context
from runners.embedding.embedder import Embedder
from runners.embedding.load import load_embedder
from runners.models.sources import local_path
from runners.rag import store
from runners.rag.chunks import window
from runners.rag.documents import Passage, Skipped, cut_documents, read_documents, to_json
from runners.rag.faiss_index import build, check_dimension
from runners.rag.search import Hit
from runners.rag.task import Faiss, RagTask, note_embedded
from runners.rows.keys import folder_digest, key_of

WHERE = "spec.faiss"
SAME_SPACE = 0.5
"""Least cosine of two embeddings of one text by the same model; different models give about 0."""


class FaissSearcher:
    """An index and its passages. See `search.Searcher`."""

    name = "faiss"

    def __init__(
        self,
        loaded: store.Loaded,
        wanted: Faiss,
        skipped: Sequence[Skipped] = (),
        cut: int = 0,
        files: dict[str, str] | str | None = None,
    ) -> None:
        """
        Args:
            files: digest of the files of an index that was not built here.
        """
        self._loaded = loaded
        self._files = files
        self._wanted = wanted
        self._skipped = skipped
        self._cut = cut

    def search(self, ctx: Context, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """See `search.Searcher`."""
        wanted, passages = self._wanted, self._loaded.passages
        scores, rows = self._loaded.index.search(ctx, vectors, top_k, nprobe=wanted.nprobe, ef_search=wanted.ef_search)
        return [
            [self._hit(passages[row], score) for score, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        about, index = self._loaded.about, self._loaded.index
        said = {name: value for name, value in msgspec.to_builtins(about.recipe).items() if value is not None}
        said |= {
            "embedding_model": about.embedding_model,
            "count": index.count,
            "device": "cuda" if index.on_gpu else "cpu",
            **index.effort,
        }
        said |= {"chunk_tokens": about.chunk_tokens, "chunk_overlap": about.chunk_overlap}
        if self._cut:
            said["passages_cut"] = self._cut
        return said if self._loaded.folder is None else {**said, "index_path": str(self._loaded.folder)}

    @functools.cached_property
    def digest(self) -> str:
        """See `search.Searcher`."""
        about = msgspec.structs.replace(self._loaded.about, embedding_model="", sha256=None)
        effort = self._wanted.nprobe, self._wanted.ef_search
        return key_of(about, self._loaded.passages.digest, self._files, *effort)

    def notes(self) -> dict[str, Any]:
        """See `search.Searcher`: the documents that are not in the index."""
        return to_json(self._skipped)

    @staticmethod
    def _hit(passage: Any, score: float) -> Hit:
        payload = msgspec.to_builtins(passage)
        payload.pop("id")
        if payload["metadata"] is None:
            payload.pop("metadata")
        return Hit(passage.id, score, payload)


def open_faiss(ctx: Context, task: RagTask) -> tuple[FaissSearcher, Embedder]:
    """The task's index, loaded or built, and the model for its queries.

    Raises:
        BadRequest: there are no documents, no such index, or the model does not fit it.
        RunnerError: a server cannot be reached.
        Cancelled: the node asked the task to stop.
    """
    wanted = task.faiss
    assert wanted is not None, "the caller has looked"
    if wanted.index is not None:
        return _open(ctx, task, wanted, store.load(ctx, wanted.index, f"{WHERE}.index"))
    if wanted.path is not None and store.is_index(local_path(ctx, wanted.path, f"{WHERE}.path")):
        for name in ("metric", "index_type", "normalize", "chunk", "save"):
            if getattr(wanted, name) is not None:
                raise BadRequest(f"{WHERE}.{name}: {WHERE}.path holds an index that is built already; leave it out")
        return _open(ctx, task, wanted, store.read(ctx, local_path(ctx, wanted.path, f"{WHERE}.path"), f"{WHERE}.path"))
    return _build(ctx, task, wanted)


def _open(ctx: Context, task: RagTask, wanted: Faiss, loaded: store.Loaded) -> tuple[FaissSearcher, Embedder]:
    recipe, own = loaded.about.recipe, loaded.about.embedding_model
    for name, owner in (("nprobe", "ivf"), ("ef_search", "hnsw")):
        if getattr(wanted, name) is not None and recipe.index_type != owner:
            raise BadRequest(
                f"{WHERE}.{name}: means something to an {owner} index only; this one is {recipe.index_type}"
            )
    note_embedded(ctx, task)
    ctx.phase("load")
    embedder = load_embedder(ctx, task.embedding, default=own)
    check_dimension(embedder.dimension, recipe.dimension)
    weights = loaded.about.embedding_weights
    if embedder.weights != weights if weights else embedder.name != own:
        _check_same_space(ctx, loaded, embedder)
    ctx.log.info("index loaded folder=%s count=%d type=%s", loaded.folder, loaded.index.count, recipe.index_type)
    assert loaded.folder is not None, "it was read from there"
    files = loaded.about.sha256 or folder_digest(loaded.folder)
    return FaissSearcher(loaded, wanted, files=files), embedder


def _check_same_space(ctx: Context, loaded: store.Loaded, embedder: Embedder) -> None:
    """Check a model that has other files than that of the index, or another name where its files are not known.

    Raises:
        BadRequest: its vectors differ from those of the index.
    """
    own = loaded.about.embedding_model
    built_with = f"other files of {own!r}" if own == embedder.name else repr(own)
    stored, made = loaded.index.vector(0), embedder.embed(ctx, [loaded.passages[0].text], "document")[0]
    norms = float(np.linalg.norm(stored) * np.linalg.norm(made))
    if norms > 0 and float(stored @ made) / norms < SAME_SPACE:
        raise BadRequest(
            f"spec.embedding.model: the vectors of {embedder.name!r} are not those of the index, which was built with "
            f"{built_with}; {'build it again' if own == embedder.name else 'use that model, or leave it out'}"
        )
    ctx.log.warning("queries are embedded by %r, the index was built with %s", embedder.name, built_with)


def _build(ctx: Context, task: RagTask, wanted: Faiss) -> tuple[FaissSearcher, Embedder]:
    documents = read_documents(ctx, wanted.documents, wanted.path, WHERE)
    skipped = list(documents.skipped)
    ctx.phase("load")
    embedder = load_embedder(ctx, task.embedding)
    chunk = wanted.chunk
    cut = window(
        None if chunk is None else chunk.tokens,
        None if chunk is None else chunk.overlap,
        model_takes=embedder.room("document"),
        where=f"{WHERE}.chunk",
    )
    ctx.phase("index")
    passages, empty = cut_documents(ctx, documents.read, embedder.tokenizer, cut)
    if not passages:
        raise BadRequest(f"{WHERE}.{wanted.source}: all documents are empty, there is nothing to find in them")
    vectors = embedder.embed(ctx, [each.text for each in passages], "document")
    cut_passages = len(embedder.cut)
    passages, vectors, nowhere = _without_zeros(passages, vectors)
    if not passages:
        raise BadRequest(f"{WHERE}.{wanted.source}: {embedder.name!r} gives a vector of zeros for every document")
    skipped += [*empty, *nowhere]
    index = build(ctx, vectors, wanted)
    about = store.About(
        version=store.VERSION,
        recipe=index.recipe,
        embedding_model=embedder.name,
        embedding_weights=embedder.weights or None,
        count=index.count,
        chunk_tokens=cut.tokens,
        chunk_overlap=cut.overlap,
    )
    built = store.Loaded(index, store.Passages.of(passages), about, None)
    if wanted.save:
        built = msgspec.structs.replace(built, folder=store.save(ctx, built))
    ctx.log.info(
        "index built documents=%d skipped=%d passages=%d type=%s",
        len(documents.read), len(skipped), index.count, index.recipe.index_type,
    )  # fmt: skip
    return FaissSearcher(built, wanted, skipped, cut_passages), embedder


def _without_zeros(passages: list[Passage], vectors: np.ndarray) -> tuple[list[Passage], np.ndarray, list[Skipped]]:
    """Passages with vectors that can be compared with a query, and the skipped rest. Zeros have no direction."""
    kept, zeros = np.flatnonzero(vectors.any(axis=1)), np.flatnonzero(~vectors.any(axis=1))
    if not zeros.size:
        return passages, vectors, []
    reason = "the embedding model gives a vector of zeros for it"
    return [passages[i] for i in kept], vectors[kept], [Skipped(passages[i].id, reason) for i in zeros]
