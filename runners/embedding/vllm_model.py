"""An embedding model on vLLM's pooling, with the methods of `Embedder` that tasks of the type `embedding` and the lines
of batch files use.

vLLM reads the pooling from a model's modules as sentence-transformers does. What it would read otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from runners.api import BadRequest, Context
from runners.embedding.embedder import Input, Vectors, pack
from runners.embedding.load import MODULES
from runners.embedding.options import EmbeddingOptions
from runners.inference.batches import cache_bytes_per_token
from runners.inference.vllm_args import Work, cpu_cache_bytes, utilization
from runners.inference.vllm_engine import set_environment, start
from runners.models.limits import check_token_ids
from runners.models.sources import Source, loading
from runners.models.weights import check_checkpoint, not_finite

KNOWN = {"Transformer", "Pooling", "Normalize"}
POOLINGS = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
BATCH_TOKENS = 32768
"""Tokens that are handed to vLLM at once; a cancel waits for them."""
_alive: list[Any] = []
"""Keeps engines until the process exits: shutting one down takes half a second."""


class VllmEmbedder:
    """A loaded model. Vectors are normalized where the model's own modules do it."""

    as_chat = False
    made_up = False
    takes_ids = True

    def __init__(self, llm: Any, files: ModelFiles, options: EmbeddingOptions, source: Source) -> None:
        self._llm = llm
        self._source = source
        config = llm.model_config
        self.name = source.shown
        self.tokenizer = files.tokenizer
        self.positions: int | None = int(config.max_model_len)
        self.max_tokens: int | None = min(files.max_tokens or config.max_model_len, config.max_model_len)
        self.dimension = int(config.get_hidden_size())
        self.prompts = files.prompts
        self.default_prompt = files.prompts.get(files.default_prompt or "", "")
        self.normalizes = "Normalize" in files.modules
        self.pooling: str | None = options.pooling or files.pooling
        self.matryoshka = bool(
            getattr(config.hf_config, "matryoshka_dimensions", None)
            or getattr(config.hf_config, "is_matryoshka", False)
        )
        self.cuts: tuple[int, ...] = tuple(getattr(config.hf_config, "matryoshka_dimensions", None) or ())
        self._vocabulary = int(config.get_vocab_size())
        self._batch_tokens = options.batch_tokens or BATCH_TOKENS

    def count(self, texts: Sequence[str], prompt: str = "") -> list[int]:
        """See `Embedder.count`."""
        found = self.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)["input_ids"]
        for ids in found:
            check_token_ids(ids, self._vocabulary, self.tokenizer, self._source.where)
        return [len(ids) for ids in found]

    def count_as_embedded(self, text: str, prompt: str = "") -> int:
        """See `Embedder.count_as_embedded`."""
        return self.count([text], prompt)[0]

    def check_ids(self, token_ids: Sequence[int], where: str) -> None:
        """See `Embedder.check_ids`."""
        check_token_ids(token_ids, self._vocabulary, self.tokenizer, where)

    def batches(self, lengths: Sequence[int], most: int | None = None) -> list[list[int]]:
        """See `Embedder.batches`."""
        return pack(lengths, self._batch_tokens, most)

    def limit(self, tokens: int) -> None:
        """See `Embedder.limit`."""
        self.max_tokens = tokens

    def pool(self, mode: str) -> None:
        """vLLM was started with it."""

    def encode(self, inputs: Sequence[Input], prompt: str) -> Vectors:
        """See `Embedder.encode`."""
        from vllm.pooling_params import PoolingParams

        rows: Sequence[Sequence[int]] = [each for each in inputs if not isinstance(each, str)]
        if not rows:
            whole = [prompt + text for text in inputs if isinstance(text, str)]
            rows = self.tokenizer(whole, truncation=True, max_length=self.max_tokens, verbose=False)["input_ids"]
        outputs = self._llm.embed(
            [{"prompt_token_ids": list(ids)} for ids in rows], use_tqdm=False,
            pooling_params=PoolingParams(use_activation=self.normalizes),
        )  # fmt: skip
        return np.array([each.outputs.embedding for each in outputs], dtype=np.float32)

    def not_finite(self) -> str:
        """The error text for vectors with NaN or infinity."""
        return not_finite(self._source.where, self.name, str(self._llm.model_config.dtype), None)

    def describe(self) -> dict[str, Any]:
        """For a task's result."""
        return {
            "model": self.name, "dimension": self.dimension, "pooling": self.pooling, "normalized": self.normalizes,
            "max_tokens": self.max_tokens, "engine": "vllm",
            "device": self._llm.llm_engine.vllm_config.device_config.device_type,
        }  # fmt: skip


class ModelFiles:
    """What a model's files say of its modules, read as sentence-transformers reads them.

    Raises:
        BadRequest: they say what vLLM does not do.
    """

    def __init__(self, source: Source, *, trust: bool, otherwise: str) -> None:
        from transformers import AutoTokenizer

        self._source = source
        self._otherwise = otherwise
        listed = self._json(MODULES)
        if listed is None:
            raise self._unfit("has no modules.json, so nothing says how its vectors are made")
        self.modules = [str(each["type"]).rpartition(".")[2] for each in listed]
        if not set(self.modules) <= KNOWN or self.modules[:2] != ["Transformer", "Pooling"] or listed[0]["path"]:
            raise self._unfit(f"has modules of its own ({', '.join(self.modules)})")
        pooling = self._json(f"{listed[1]['path']}/config.json") or {}
        given = pooling.get("pooling_mode")
        found = [given] if isinstance(given, str) else [mode for mode, name in _LEGACY.items() if pooling.get(name)]
        if len(found) != 1 or found[0] not in POOLINGS:
            raise self._unfit(f"pools its tokens by {', '.join(map(str, found)) or 'something else'}")
        if pooling.get("include_prompt") is False:
            raise self._unfit("leaves the prompt's tokens out of its pooling")
        self.pooling = str(found[0])
        body = self._json("sentence_bert_config.json") or {}
        if body.get("do_lower_case"):
            raise self._unfit("has its texts in lower case by a setting of its own (do_lower_case)")
        self.max_tokens: int | None = body.get("max_seq_length")
        own = self._json("config_sentence_transformers.json") or {}
        self.prompts = {str(name): str(text or "") for name, text in (own.get("prompts") or {}).items()}
        self.default_prompt: str | None = own.get("default_prompt_name")
        with loading(source):
            self.tokenizer = AutoTokenizer.from_pretrained(
                source.path, revision=source.revision, trust_remote_code=trust
            )

    def _json(self, name: str) -> Any:
        from transformers.utils import cached_file

        with loading(self._source):
            path = cached_file(
                self._source.path, name, revision=self._source.revision, _raise_exceptions_for_missing_entries=False
            )
        return None if path is None else json.loads(Path(path).read_bytes())

    def _unfit(self, why: str) -> BadRequest:
        return BadRequest(
            f"spec.engine: {self._source.shown!r} {why}; vLLM would give other vectors: set it to {self._otherwise}"
        )


_LEGACY = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "lasttoken": "pooling_mode_lasttoken",
           "max": "pooling_mode_max_tokens", "weightedmean": "pooling_mode_weightedmean_tokens",
           "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens"}  # fmt: skip


def load_vllm(
    ctx: Context,
    source: Source,
    options: EmbeddingOptions,
    *,
    trust: bool,
    otherwise: str = "sentence_transformers",
) -> VllmEmbedder:
    """The task's model on vLLM.

    Args:
        otherwise: the name that the document has for the other engine.

    Raises:
        BadRequest: there is no such model, its weights are incomplete, or vLLM's vectors would be others.
        RunnerError: the engine did not start, or the hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModel

    files = ModelFiles(source, trust=trust, otherwise=otherwise)
    if options.pooling is not None and options.pooling not in POOLINGS:
        known = ", ".join(POOLINGS)
        raise BadRequest(f"spec.embedding.pooling: {options.pooling!r} is not one of vLLM's ({known})")
    check_checkpoint(AutoModel, source, head="none", trust_remote_code=trust)
    with loading(source):
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust)
    pooler = {} if options.pooling is None else {"pooler_config": {"seq_pooling_type": POOLINGS[options.pooling]}}
    arguments = {"convert": "embed", "trust_remote_code": trust, **pooler}
    llm = start_pooling(ctx, source, config, arguments, dtype=options.dtype, length=options.max_seq_length)
    return VllmEmbedder(llm, files, options, source)


def start_pooling(
    ctx: Context, source: Source, config: Any, arguments: dict[str, Any], *, dtype: str | None, length: int | None
) -> Any:
    """vLLM's `LLM` for a model whose texts are read whole. It lives until the process exits.

    Args:
        config: the model's, of Transformers.
        arguments: of `LLM`, besides those that are the same for all.
        dtype: None: that of the files.
        length: tokens of a text at most; None: as many as the model can.
    """
    arguments = {
        **arguments, "runner": "pooling", "enforce_eager": True, "max_model_len": length or -1,
        # vLLM's own choice on a GPU would be half of the precision that the files have.
        "dtype": dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    }  # fmt: skip
    if ctx.gpus:
        arguments["gpu_memory_utilization"] = utilization(ctx, {})
    else:
        work = Work(prompts=64, prompt_bytes=BATCH_TOKENS, new_tokens=1, copies=1)
        per_token = cache_bytes_per_token(config.get_text_config(), 4)
        arguments["kv_cache_memory_bytes"] = cpu_cache_bytes(work, per_token, psutil.virtual_memory().available)
    set_environment(ctx, alone=True, eager=True)
    llm = start(source.path, source.revision, source, arguments, asked=[])
    _alive.append(llm)
    return llm
