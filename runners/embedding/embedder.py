"""A loaded model of sentence-transformers: counts the tokens of texts, and embeds them in batches of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flowmesh.messages.job import Fault
from runners.api import BadRequest, Context, RunnerError
from runners.embedding.options import Embedding, ModelOptions
from runners.gpu_memory import is_shortage
from runners.models.limits import check_token_ids, embedding_rows
from runners.models.weights import first_not_finite, not_finite
from runners.rows.keys import key_of

WHERE = "spec.embedding.model"
CPU_BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 65536
UNBOUNDED_TOKENS = 100_000
"""Tokenizers without a bound report a number above this."""
COUNTED = 1024
"""Texts that are tokenized at a time for counting; the tokens take many times the memory of the texts."""

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Input = str | tuple[int, ...]
"""A text, or token ids."""


class EmbeddingOutOfMemory(RunnerError):
    """The device has too little memory for the embedding model, or for a single text."""

    fault = Fault.GPU_OOM


class Embedder:
    """A loaded model. Its vectors are normalized only if the model's own modules do it."""

    def __init__(self, model: Any, options: ModelOptions, *, name: str, weights: str = "", where: str = WHERE) -> None:
        """
        Args:
            model: a SentenceTransformer.
            weights: digest of the model's files.
            where: the document's field that names the model, for errors.
        """
        self._model = model
        self._where = where
        self.name = name
        self._weights = weights
        self.tokenizer = model.tokenizer
        self.device = str(model.device)
        self.dimension = int(model.get_embedding_dimension())
        limit = model.max_seq_length
        self.max_tokens = None if limit is None or limit > UNBOUNDED_TOKENS else int(limit)
        """Tokens of a text that the model uses, including special ones; None: unbounded."""
        self.positions: int | None = None
        """Tokens that its layers take; None: not known."""
        self.cut: list[int] = []
        """Indices of the texts of the last `embed` that were longer than that and were truncated."""
        self._rows = embedding_rows(body) if (body := body_of(model)) is not None else None
        on_cpu = self.device == "cpu"
        self._batch_tokens = options.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        own = model.prompts or {}
        self.default_prompt: str = own.get(model.default_prompt_name) or ""
        """What sentence-transformers' `encode` puts before each text unless it is told otherwise."""
        self.as_chat = _as_chat(model)
        """Whether a text is embedded as a chat's message: so it is for models with a chat template."""
        self.made_up = False
        """Whether the model's files do not say how its vectors are made, so that sentence-transformers assumed it."""
        self.normalizes = any(type(each).__name__ == "Normalize" for each in model)
        self.pooling: str | None = next(
            (str(each.pooling_mode) for each in model if hasattr(each, "pooling_mode")), None
        )
        config = getattr(body_of(model), "config", None)
        self.matryoshka = bool(
            getattr(config, "matryoshka_dimensions", None) or getattr(config, "is_matryoshka", False)
        )
        """Whether its vectors may be cut, as the model's configuration says."""
        self.cuts: tuple[int, ...] = tuple(getattr(config, "matryoshka_dimensions", None) or ())
        """The dimensions that they may be cut to; empty: any."""
        self.prompts: dict[str, str] = {name: str(text or "") for name, text in own.items()}
        """Those in the model's files."""
        given = options if isinstance(options, Embedding) else Embedding()
        self._prompts = {
            "query": own.get("query", "") if given.query_prompt is None else given.query_prompt,
            "document": own.get("document", own.get("passage", ""))
            if given.document_prompt is None
            else given.document_prompt,
        }

    @property
    def weights(self) -> str:
        """Digest of the model's files."""
        return self._weights

    @property
    def digest(self) -> str:
        """Identity of the vectors that it computes: its weights, prompts and bound on texts."""
        return key_of(self._weights, self._prompts, self.max_tokens)

    def embed(self, ctx: Context, texts: Sequence[str], kind: str) -> Vectors:
        """One row for each text, in order.

        Args:
            kind: `query` or `document`; some models have a prompt for each.

        Raises:
            EmbeddingOutOfMemory: even one text at a time does not fit the device.
            BadRequest: the model computes NaN or infinity, or has no embedding for a token of a text.
            Cancelled: the node asked the task to stop.
        """
        prompt = self._prompts[kind] or ""
        lengths: list[int] = []
        for start in range(0, len(texts), COUNTED):
            ctx.progress(0, len(texts), f"{kind} embeddings")
            some = texts[start : start + COUNTED]
            lengths += (
                [self.count_as_embedded(text, prompt) for text in some] if self.as_chat else self.count(some, prompt)
            )
        limit = self.max_tokens
        self.cut = [i for i, length in enumerate(lengths) if limit is not None and length > limit]
        if limit is not None and self.cut:
            ctx.log.warning(
                "texts cut for the embedding model kind=%s count=%d max_tokens=%d", kind, len(self.cut), limit
            )
            lengths = [min(length, limit) for length in lengths]
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        done = 0
        for batch in pack(lengths, self._batch_tokens):
            ctx.progress(done, len(texts), f"{kind} embeddings")
            vectors[batch] = self.encode([texts[i] for i in batch], prompt)
            done += len(batch)
        ctx.progress(done, len(texts), f"{kind} embeddings")
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if broken.size:
            said = self.not_finite()
            raise BadRequest(f"{said} ({broken.size} of {len(texts)} {kind} texts, first {texts[broken[0]]!r:.60})")
        return vectors

    def room(self, kind: str) -> int | None:
        """Tokens of a text that the model uses, without special ones and its prompt; None: unbounded."""
        return None if self.max_tokens is None else self.max_tokens - self.count_as_embedded("", self._prompts[kind])

    def count(self, texts: Sequence[str], prompt: str = "") -> list[int]:
        """Tokens of each text, including special ones and the prompt, before truncation."""
        if not texts:
            return []
        whole = [prompt + text for text in texts]
        tokenized = self.tokenizer(whole, truncation=False, verbose=False)["input_ids"]
        for ids in tokenized:
            self.check_ids(ids, self._where)
        return [len(ids) for ids in tokenized]

    def count_as_embedded(self, text: str, prompt: str = "") -> int:
        """Tokens of one text as `encode` has them before truncation, also for a model that embeds chats."""
        if not self.as_chat:
            return self.count([text], prompt)[0]
        whole = {"text": {"truncation": False}}
        ids = self._model.preprocess([text], prompt=prompt or None, processing_kwargs=whole)["input_ids"][0].tolist()
        self.check_ids(ids, self._where)
        return len(ids)

    def check_ids(self, token_ids: Sequence[int], where: str) -> None:
        """Raises BadRequest for a token that the model has no embedding for."""
        check_token_ids(token_ids, self._rows, self.tokenizer, where)

    def batches(self, lengths: Sequence[int], most: int | None = None) -> list[list[int]]:
        """Indices of inputs in batches that the device takes; see `pack`."""
        return pack(lengths, self._batch_tokens, most)

    def limit(self, tokens: int) -> None:
        """Use at most so many tokens of a text; the caller has compared them with `positions`."""
        self.max_tokens = tokens
        self._model.max_seq_length = tokens

    def pool(self, mode: str) -> None:
        """Pool the tokens' vectors in another way than the model's files say.

        Raises:
            BadRequest: the model has no such module.
        """
        modules = [each for each in self._model if hasattr(each, "pooling_mode")]
        if not modules:
            raise BadRequest(f"spec.embedding.pooling: {self.name!r} has no pooling to change; leave it out")
        for each in modules:
            if not isinstance(each.pooling_mode, str):
                raise BadRequest(
                    f"spec.embedding.pooling: {self.name!r} joins several poolings ({', '.join(each.pooling_mode)}); "
                    "one of them has another dimension; leave it out"
                )
            each.pooling_mode = mode
        self.pooling = mode

    def encode(self, inputs: Sequence[Input], prompt: str) -> Vectors:
        """One row for each input, in one batch; in smaller ones where the GPU's memory is short. NaN is not looked for.

        Args:
            inputs: all texts; or all token ids, which get neither special tokens nor the prompt.

        Raises:
            EmbeddingOutOfMemory: even one input at a time does not fit the device.
        """
        try:
            if not isinstance(inputs[0], str):
                return self._encode_ids([each for each in inputs if not isinstance(each, str)])
            return self._model.encode(
                list(inputs), prompt=prompt, batch_size=len(inputs), show_progress_bar=False, convert_to_numpy=True
            )
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            shortage = str(error).splitlines()[0]
        if len(inputs) == 1:
            raise EmbeddingOutOfMemory(f"one text does not fit the GPU's memory beside the model: {shortage}")
        half = len(inputs) // 2
        return np.concatenate([self.encode(inputs[:half], prompt), self.encode(inputs[half:], prompt)])

    def describe(self) -> dict[str, Any]:
        """For a task's result."""
        return {
            "model": self.name, "dimension": self.dimension, "device": self.device, "pooling": self.pooling,
            "normalized": self.normalizes, "max_tokens": self.max_tokens,
        }  # fmt: skip

    @property
    def takes_ids(self) -> bool:
        """Whether token ids can be embedded: only by a model whose first part is one of Transformers."""
        return body_of(self._model) is not None

    def _encode_ids(self, rows: Sequence[tuple[int, ...]]) -> Vectors:
        padded = self.tokenizer.pad({"input_ids": [list(each) for each in rows]}, padding=True, return_tensors="pt")
        features = {**padded, "modality": "text"}
        if "token_type_ids" in self.tokenizer.model_input_names:
            features["token_type_ids"] = torch.zeros_like(padded["input_ids"])
        self._model.eval()
        with torch.inference_mode():
            moved = {key: each.to(self.device) if torch.is_tensor(each) else each for key, each in features.items()}
            vectors = self._model(moved)["sentence_embedding"]
        found: Vectors = vectors.float().cpu().numpy()
        return found

    def not_finite(self) -> str:
        """The error text for vectors with NaN or infinity."""
        dtype = str(next(self._model.parameters()).dtype)
        return not_finite(self._where, self.name, dtype, first_not_finite(self._model))


def pack(lengths: Sequence[int], batch_tokens: int, most: int | None = None) -> list[list[int]]:
    """Indices in batches whose padded size (longest × count) is within `batch_tokens`; long texts first.

    A text that is longer than that by itself is a batch of its own.

    Args:
        most: inputs in one batch; None: any number.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = not batches or len(batches[-1]) == most or longest * (len(batches[-1]) + 1) > batch_tokens
        if full:
            batches.append([])
            longest = max(lengths[index], 1)
        batches[-1].append(index)
    return batches


def _as_chat(model: Any) -> bool:
    if "message" not in (getattr(model[0], "modality_config", None) or {}):
        return False
    return bool(model.preprocess(["a"]).get("modality") == "message")


def body_of(model: Any) -> Any:
    """The Transformers model inside; None for other kinds of embeddings."""
    return getattr(model[0], "auto_model", None)
