"""A cross-encoder on vLLM's pooling, with the methods of `Scorer` that a task uses.

vLLM gives the logits, and the activation is applied here. Models that vLLM would read in another way are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runners.api import BadRequest, Context
from runners.embedding.embedder import pack
from runners.embedding.load import MODULES
from runners.embedding.vllm_model import BATCH_TOKENS, start_pooling
from runners.models.code import may_run_code
from runners.models.limits import check_token_ids
from runners.models.sources import Source, loading
from runners.models.weights import check_checkpoint, not_finite
from runners.scoring.scorer import SECTION, Pair, Scores
from runners.scoring.task import ScoreOptions, ScoreTask


class VllmScorer:
    """One number for each pair."""

    labels = 1

    def __init__(self, llm: Any, tokenizer: Any, activation: str, options: ScoreOptions, source: Source) -> None:
        self._llm = llm
        self._tokenizer = tokenizer
        self._activation = activation
        self._options = options
        self._source = source
        longest = int(llm.model_config.max_model_len)
        own = int(min(tokenizer.model_max_length, longest))
        self.max_tokens: int | None = options.max_seq_length or own

    def count(self, pairs: Sequence[Pair]) -> list[int]:
        """See `Scorer.count`."""
        queries, documents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        found = self._tokenizer(queries, documents, truncation=False, verbose=False)["input_ids"]
        for ids in found:
            check_token_ids(ids, self._llm.model_config.get_vocab_size(), self._tokenizer, self._source.where)
        return [len(ids) for ids in found]

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """See `Scorer.batches`."""
        return pack(lengths, self._options.batch_tokens or BATCH_TOKENS, self._options.batch_size)

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """See `Scorer.score`."""
        from vllm.pooling_params import PoolingParams

        outputs = self._llm.score(
            [pair[0] for pair in pairs], [pair[1] for pair in pairs], use_tqdm=False,
            pooling_params=PoolingParams(use_activation=False),
            tokenization_kwargs={"truncate_prompt_tokens": self.max_tokens},
        )  # fmt: skip
        logits: Scores = np.array([[each.outputs.score] for each in outputs], dtype=np.float32)
        if self._activation == "identity":
            return logits
        found: Scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return found

    def not_finite(self) -> str:
        """The error text for scores with NaN or infinity."""
        return not_finite(self._source.where, self._source.shown, str(self._llm.model_config.dtype), None)

    def describe(self) -> dict[str, Any]:
        """For a task's result."""
        return {
            "model": self._source.shown, "labels": 1, "max_tokens": self.max_tokens, "activation": self._activation,
            "engine": "vllm", "device": self._llm.llm_engine.vllm_config.device_config.device_type,
        }  # fmt: skip


def load_vllm(ctx: Context, task: ScoreTask, source: Source) -> VllmScorer:
    """The task's cross-encoder on vLLM.

    Raises:
        BadRequest: there is no such model, its weights are incomplete, or vLLM's scores would be others.
        RunnerError: the engine did not start, or the hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    options = task.options
    wanted = task.model.trust_remote_code if options.trust_remote_code is None else options.trust_remote_code
    trust = may_run_code(ctx, source, wanted, f"{SECTION}.trust_remote_code")
    with loading(source):
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust)
    activation = _check(config, options, source)
    check_checkpoint(AutoModelForSequenceClassification, source, head="whole", trust_remote_code=trust)
    arguments = {"convert": "classify", "trust_remote_code": trust}
    llm = start_pooling(ctx, source, config, arguments, dtype=options.dtype, length=options.max_seq_length)
    return VllmScorer(llm, tokenizer, activation, options, source)


def _check(config: Any, options: ScoreOptions, source: Source) -> str:
    """The activation of the model's logits.

    Raises:
        BadRequest: vLLM would read the model in another way than sentence-transformers.
    """
    for name in ("prompt", "prompt_name"):
        if getattr(options, name) is not None:
            raise BadRequest(f"{SECTION}.{name}: not with engine vllm; leave it out, or use sentence_transformers")
    kinds = config.architectures or ["no architecture"]
    if (
        config.num_labels != 1
        or not kinds[0].endswith("ForSequenceClassification")
        or _modules(source) - {"Transformer"}
    ):
        raise BadRequest(
            f"spec.engine: {source.shown!r} is not a cross-encoder of one label and one head ({kinds[0]}), so vLLM "
            "would give other scores: set it to sentence_transformers"
        )
    if options.activation is not None:
        return "identity" if options.activation == "identity" else _one_label(options.activation)
    own = getattr(config, "sentence_transformers", None) or {}
    named = own.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
    short = "sigmoid" if named is None else str(named).rpartition(".")[2].lower()
    if short not in ("sigmoid", "identity"):
        raise BadRequest(
            f"{SECTION}.activation: the model's own is {short!r}; name sigmoid or identity with engine vllm"
        )
    return short


def _one_label(activation: str) -> str:
    if activation == "softmax":
        raise BadRequest(f"{SECTION}.activation: softmax is over several labels; with engine vllm there is one")
    return activation


def _modules(source: Source) -> set[str]:
    from transformers.utils import cached_file

    with loading(source):
        path = cached_file(source.path, MODULES, revision=source.revision, _raise_exceptions_for_missing_entries=False)
    listed = [] if path is None else json.loads(Path(path).read_bytes())
    return {str(each["type"]).rpartition(".")[2] for each in listed}
