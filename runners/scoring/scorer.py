"""A loaded cross-encoder of sentence-transformers: counts the tokens of pairs, and scores them in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from runners.api import BadRequest, Context
from runners.embedding.embedder import (
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    UNBOUNDED_TOKENS,
    EmbeddingOutOfMemory,
    body_of,
    pack,
)
from runners.embedding.load import device_of
from runners.gpu_memory import is_shortage
from runners.models.code import may_run_code
from runners.models.limits import check_token_ids, embedding_rows, positions
from runners.models.sources import Source, loading
from runners.models.weights import check_loaded, first_not_finite, not_finite
from runners.scoring.task import ScoreOptions, ScoreTask

SECTION = "spec.score"
Pair = tuple[str, str]
Scores = np.ndarray[Any, np.dtype[np.float32]]


class Scorer:
    """One number for each pair, or one for each of the model's labels."""

    def __init__(self, model: Any, options: ScoreOptions, source: Source) -> None:
        """
        Args:
            model: a CrossEncoder.

        Raises:
            BadRequest: it does not have what the options ask for.
        """
        self._model = model
        self._options = options
        self._source = source
        self.labels = int(model.num_labels)
        self.device = str(model.device)
        self._prompt = _prompt(model, options, source)
        body = body_of(model)
        self._rows = None if body is None else embedding_rows(body)
        count = None if body is None else positions(body)
        longest = model.max_seq_length
        longest = None if longest is None or longest > UNBOUNDED_TOKENS else int(longest)
        if count is not None:
            longest = min(longest or count, count)
        wanted = options.max_seq_length
        if wanted is not None and count is not None and wanted > count:
            raise BadRequest(f"{SECTION}.max_seq_length: {wanted}, and {source.shown!r} takes {count}; lower it")
        self.max_tokens = wanted or longest
        """Tokens of a pair that the model uses; None: unbounded."""
        if self.max_tokens is not None:
            model.max_seq_length = self.max_tokens
        self._batch_tokens = options.batch_tokens or (CPU_BATCH_TOKENS if self.device == "cpu" else GPU_BATCH_TOKENS)

    def count(self, pairs: Sequence[Pair]) -> list[int]:
        """Tokens of each pair, with special ones and the prompt, before truncation.

        Raises:
            BadRequest: the model has no embedding for a token.
        """
        whole = {"text": {"truncation": False}}
        found = []
        for pair in pairs:
            ids = self._model.preprocess([list(pair)], prompt=self._prompt, processing_kwargs=whole)["input_ids"][0]
            check_token_ids(ids.tolist(), self._rows, self._model.tokenizer, self._source.where)
            found.append(len(ids))
        return found

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of pairs in batches that the device takes."""
        return pack(lengths, self._batch_tokens, self._options.batch_size)

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """pairs × labels, in one batch; in smaller ones where the GPU's memory is short. NaN is not looked for.

        Raises:
            EmbeddingOutOfMemory: even one pair at a time does not fit the device.
        """
        try:
            scores = self._model.predict(
                [list(each) for each in pairs], prompt=self._prompt, batch_size=len(pairs), show_progress_bar=False,
                activation_fn=_activation(self._options), apply_softmax=self._options.activation == "softmax",
            )  # fmt: skip
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            shortage = str(error).splitlines()[0]
        else:
            found: Scores = np.asarray(scores, dtype=np.float32).reshape(len(pairs), -1)
            return found
        if len(pairs) == 1:
            raise EmbeddingOutOfMemory(f"one pair does not fit the GPU's memory beside the model: {shortage}")
        half = len(pairs) // 2
        return np.concatenate([self.score(pairs[:half]), self.score(pairs[half:])])

    def not_finite(self) -> str:
        """The error text for scores with NaN or infinity."""
        dtype = str(next(self._model.parameters()).dtype)
        return not_finite(self._source.where, self._source.shown, dtype, first_not_finite(self._model))

    def describe(self) -> dict[str, Any]:
        """For a task's result."""
        own = type(self._model.activation_fn).__name__.lower()
        return {
            "model": self._source.shown, "labels": self.labels, "device": self.device, "max_tokens": self.max_tokens,
            "activation": self._options.activation or own, **({"prompt": self._prompt} if self._prompt else {}),
        }  # fmt: skip


def load_scorer(ctx: Context, task: ScoreTask, source: Source) -> Scorer:
    """The task's cross-encoder, loaded and checked.

    Raises:
        BadRequest: there is no such model, or its checkpoint does not hold all of its weights, its head included.
        EmbeddingOutOfMemory: it does not fit the device.
        RunnerError: the model hub cannot be reached.
    """
    from huggingface_hub import constants
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(max(ctx.threads, 1))
    options = task.options
    wanted = task.model.trust_remote_code if options.trust_remote_code is None else options.trust_remote_code
    trust = may_run_code(ctx, source, wanted, f"{SECTION}.trust_remote_code")
    device = device_of(ctx, "cpu" if task.on_cpu else options.device, f"{SECTION}.device")
    try:
        with loading(source):
            model = CrossEncoder(
                source.path, revision=source.revision, device=device, trust_remote_code=trust,
                model_kwargs=None if options.dtype is None else {"dtype": options.dtype},
                local_files_only=source.is_local or bool(constants.HF_HUB_OFFLINE),
            )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise EmbeddingOutOfMemory(
            f"{source.where}: {source.shown!r} does not fit the GPU's memory: {str(error).splitlines()[0]}"
        ) from error
    body = body_of(model)
    if body is not None:
        check_loaded(body, source, head="whole")  # a head that is not there would be random, and so every score
    return Scorer(model, options, source)


def _activation(options: ScoreOptions) -> Any:
    match options.activation:
        case None:
            return None
        case "sigmoid":
            return torch.nn.Sigmoid()
    return torch.nn.Identity()


def _prompt(model: Any, options: ScoreOptions, source: Source) -> str | None:
    if options.prompt is not None:
        return options.prompt
    known = model.prompts or {}
    if options.prompt_name is not None:
        if options.prompt_name not in known:
            raise BadRequest(
                f"{SECTION}.prompt_name: {source.shown!r} has no prompt {options.prompt_name!r}; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        return str(known[options.prompt_name])
    own = known.get(model.default_prompt_name)
    return None if own is None else str(own)
