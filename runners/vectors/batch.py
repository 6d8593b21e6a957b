"""Embeds the items of a task and of its merged children: each different text once, in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from runners.api import BadRequest, Context
from runners.embedding.embedder import COUNTED, Vectors
from runners.embedding.options import EmbeddingOptions
from runners.vectors.part import Finished


class Model(Protocol):
    """A loaded embedding model; see `Embedder`, which has more."""

    name: str
    dimension: int
    max_tokens: int | None
    positions: int | None
    prompts: dict[str, str]
    default_prompt: str
    as_chat: bool
    made_up: bool
    normalizes: bool
    pooling: str | None
    matryoshka: bool
    cuts: tuple[int, ...]

    def count(self, texts: Sequence[str], prompt: str = "") -> list[int]: ...
    def count_as_embedded(self, text: str, prompt: str = "") -> int: ...
    def batches(self, lengths: Sequence[int], most: int | None = None) -> list[list[int]]: ...
    def limit(self, tokens: int) -> None: ...
    def pool(self, mode: str) -> None: ...
    def encode(self, inputs: Sequence[str], prompt: str) -> Vectors: ...
    def not_finite(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...


class Wanted(msgspec.Struct):
    """One text, and the items that have it."""

    text: str
    where: str
    places: list[tuple[Finished, int]]
    tokens: int = 0


class Batch:
    """The items that have no row."""

    def __init__(self, ctx: Context, embedder: Model, options: EmbeddingOptions, parts: Sequence[Finished]) -> None:
        """
        Raises:
            BadRequest: the model has no such prompt, or takes fewer tokens or dimensions than asked for.
        """
        self._ctx = ctx
        self._embedder = embedder
        self._options = options
        self._parts = parts
        self.prompt = _prompt(embedder, options)
        _limit(embedder, options)
        if options.pooling is not None:
            embedder.pool(options.pooling)
        self._done = sum(each.log.counts.done for each in parts)
        self._total = sum(each.log.counts.total for each in parts)
        self._tokens = 0

    @property
    def normalized(self) -> bool:
        """Whether the vectors are of unit length."""
        return bool(self._options.normalize) or (self._embedder.normalizes and self._options.truncate_dim is None)

    def run(self) -> None:
        """Embed them, and write their rows.

        Raises:
            BadRequest: a text is too long and may not be cut, or its vector has NaN or infinity.
            Cancelled: the node asked the task to stop.
        """
        wanted = self._wanted()
        self._count(wanted)
        for batch in self._embedder.batches([self._used(each) for each in wanted], self._options.batch_size):
            self._step()
            chosen = [wanted[number] for number in batch]
            self._finish(chosen, self._embedder.encode([each.text for each in chosen], self.prompt))
        self._step()

    def _wanted(self) -> list[Wanted]:
        found: dict[str, Wanted] = {}
        for finished in self._parts:
            part = finished.part
            for index, text in enumerate(part.texts):
                if index not in finished.log.rows:
                    each = found.setdefault(text, Wanted(text, part.items.wheres[index], []))
                    each.places.append((finished, index))
        return list(found.values())

    def _count(self, wanted: Sequence[Wanted]) -> None:
        model, longest = self._embedder, self._embedder.max_tokens
        for first in range(0, len(wanted), COUNTED):
            self._step()
            some = wanted[first : first + COUNTED]
            if model.as_chat:
                lengths = [model.count_as_embedded(each.text, self.prompt) for each in some]
            else:
                lengths = model.count([each.text for each in some], self.prompt)
            for each, tokens in zip(some, lengths, strict=True):
                each.tokens = tokens
                if tokens == 0:
                    raise BadRequest(f"{each.where}: has no tokens, so the model has no vector for it; leave it out")
                if longest is not None and tokens > longest and self._options.truncate is False:
                    raise BadRequest(
                        f"{each.where}: has {tokens} tokens, and the model uses {longest}; shorten it, or leave "
                        "spec.embedding.truncate out"
                    )

    def _used(self, wanted: Wanted) -> int:
        longest = self._embedder.max_tokens
        return wanted.tokens if longest is None else min(wanted.tokens, longest)

    def _finish(self, chosen: Sequence[Wanted], raw: Vectors) -> None:
        broken = np.flatnonzero(~np.isfinite(raw).all(axis=1))
        bad = set(broken.tolist())
        vectors = shaped(raw, self._options)
        for number, (each, vector) in enumerate(zip(chosen, vectors, strict=True)):
            if number in bad:
                continue
            used = self._used(each)
            marks: dict[str, Any] = {"truncated": True, "tokens_given": each.tokens} if used < each.tokens else {}
            if not vector.any():
                marks["zero_vector"] = True
            for finished, index in each.places:
                finished.add(index, vector, used, marks)
                self._done += 1
                self._tokens += used
        if bad:
            raise BadRequest(f"{chosen[int(broken[0])].where}: {self._embedder.not_finite()}")

    def _step(self) -> None:
        self._ctx.progress(self._done, self._total, "items", tokens=float(self._tokens))


def shaped(raw: Vectors, options: EmbeddingOptions) -> Vectors:
    """Vectors of a model, cut and normalized as asked for, in the order of sentence-transformers' `encode`."""
    vectors = raw if options.truncate_dim is None else raw[:, : options.truncate_dim]
    if not options.normalize:
        return vectors
    unit: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def quantized(vectors: Vectors, options: EmbeddingOptions) -> np.ndarray[Any, Any]:
    """The vectors in the precision asked for, as sentence-transformers quantizes them.

    Raises:
        BadRequest: there is one vector only, which gives int8 no steps.
    """
    precision = options.precision or "float32"
    if precision == "float32":
        return vectors
    from sentence_transformers.util.quantization import quantize_embeddings

    if precision.endswith("int8") and len(vectors) < 2:
        raise BadRequest(f"spec.embedding.precision: {precision!r} takes its steps from all vectors, and there is one")
    ranges = None
    if precision.endswith("int8"):  # a component that is the same everywhere has no steps, and would divide 0 by 0
        least, most = vectors.min(axis=0), vectors.max(axis=0)
        ranges = np.stack([least, np.where(most > least, most, least + 1)])
    found: np.ndarray[Any, Any] = quantize_embeddings(vectors, precision=precision, ranges=ranges)
    return found


def _prompt(embedder: Model, options: EmbeddingOptions) -> str:
    if options.prompt is not None:
        return options.prompt
    if options.prompt_name is None:
        return embedder.default_prompt
    if options.prompt_name not in embedder.prompts:
        known = ", ".join(sorted(embedder.prompts)) or "none"
        raise BadRequest(
            f"spec.embedding.prompt_name: {embedder.name!r} has no prompt {options.prompt_name!r}; it has {known}"
        )
    return embedder.prompts[options.prompt_name]


def _limit(embedder: Model, options: EmbeddingOptions) -> None:
    wanted, longest = options.max_seq_length, embedder.max_tokens
    if wanted is not None and embedder.positions is not None and wanted > embedder.positions:
        raise BadRequest(
            f"spec.embedding.max_seq_length: {wanted}, and {embedder.name!r} takes {embedder.positions}; lower it"
        )
    if wanted is not None and wanted != longest:
        embedder.limit(wanted)
    if options.truncate_dim is not None and options.truncate_dim > embedder.dimension:
        raise BadRequest(
            f"spec.embedding.truncate_dim: {options.truncate_dim}; the model's vectors have {embedder.dimension}"
        )
