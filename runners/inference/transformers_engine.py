"""The Transformers engine: one model, batches of left-padded prompts of similar length.

An answer does not depend on its batch. Batches are limited by tokens of key-value cache; one that still runs out of
memory is halved and tried again.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from runners.api import BadRequest
from runners.gpu_memory import is_shortage
from runners.inference.batches import Batch, plan
from runners.inference.engine import Completion, FinishReason, GpuOutOfMemory, Output, Request, Watch
from runners.inference.options import Sampling
from runners.inference.sampling import Limits, NotFinite, Picker
from runners.inference.tokens import Reader, Texts
from runners.models.limits import embedding_rows, positions
from runners.models.sources import Source
from runners.models.weights import first_not_finite, not_finite


class TransformersEngine:
    """A causal language model of Transformers, loaded by `loader`."""

    name = "transformers"

    def __init__(
        self, model: Any, texts: Texts, *, batch_tokens: int, batch_rows: int, source: Source | None = None
    ) -> None:
        """
        Args:
            batch_tokens: limit of one batch's tokens, prompts and answers together.
            batch_rows: limit of one batch's sequences.
            source: of the model, for errors.
        """
        self._model = model
        self._texts = texts
        self._source = source
        self._batch_tokens = batch_tokens
        self._batch_rows = batch_rows
        self._ends = texts.end_ids(getattr(model, "generation_config", None))
        self.vocabulary = embedding_rows(model)
        self.max_positions = positions(model)
        self._pad = self._pad_id()
        # Otherwise the sampling defaults of the model's authors would apply to every request.
        model.generation_config = GenerationConfig(pad_token_id=self._pad)

    def describe(self) -> dict[str, Any]:
        model = self._model
        return {"engine": self.name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}

    def generate(self, requests: list[Request], sampling: Sampling, watch: Watch) -> list[Completion]:
        """See `Engine.generate`. Batches have one adapter and prompts of similar length."""
        sampling = self._texts.resolved(sampling)
        answers: list[list[Output | None]] = [[None] * sampling.n for _ in requests]
        try:
            self._answer(requests, sampling, watch, answers)
        except NotFinite:
            where, shown = (self._source.where, self._source.shown) if self._source else ("model", "the model")
            raise BadRequest(not_finite(where, shown, str(self._model.dtype), first_not_finite(self._model))) from None
        return [Completion(tuple(each for each in outputs if each is not None)) for outputs in answers]

    def _answer(
        self, requests: list[Request], sampling: Sampling, watch: Watch, answers: list[list[Output | None]]
    ) -> None:
        for adapter in sorted({request.adapter for request in requests}, key=lambda name: name or ""):
            self._use(adapter)
            lengths = [(i, len(r.token_ids)) for i, r in enumerate(requests) if r.adapter == adapter]
            batches = plan(
                lengths,
                copies=sampling.n,
                new_tokens=sampling.max_tokens,
                max_positions=self.max_positions,
                batch_tokens=self._batch_tokens,
                batch_rows=self._batch_rows,
            )
            for batch in batches:
                for row, output in zip(batch, self._run(batch, requests, sampling, watch), strict=True):
                    answers[row.request][row.copy] = output

    def _run(self, batch: Batch, requests: list[Request], sampling: Sampling, watch: Watch) -> list[Output]:
        tokens, finished = watch.tokens, watch.answers
        try:
            return self._generate(batch, requests, sampling, watch)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            shortage = str(error)
        # Outside the handler, so that the traceback no longer references the tensors that did not fit.
        gc.collect()
        torch.cuda.empty_cache()
        watch.rewind(tokens=tokens, answers=finished)
        if len(batch) == 1:
            length = len(requests[batch[0].request].token_ids)
            raise GpuOutOfMemory(
                f"the GPU's memory does not hold one prompt of {length} tokens and its answer: "
                f"{shortage.splitlines()[0]}"
            )
        self._batch_rows = max(len(batch) // 2, 1)
        half = (len(batch) + 1) // 2
        return [
            *self._run(batch[:half], requests, sampling, watch),
            *self._run(batch[half:], requests, sampling, watch),
        ]

    def _generate(self, batch: Batch, requests: list[Request], sampling: Sampling, watch: Watch) -> list[Output]:
        prompts = [requests[row.request].token_ids for row in batch]
        input_ids, mask = self._pad_left(prompts)
        width = input_ids.shape[1]
        room = [self._room(len(prompt), sampling) for prompt in prompts]
        seeds = [None if sampling.seed is None else sampling.seed + row.copy for row in batch]
        stop_ids = frozenset(sampling.stop_token_ids)
        model_ends = self._ends.union(requests[batch[0].request].ends)  # a batch has one adapter
        limits = Limits(self._texts.bad_word_ids(sampling.bad_words), model_ends | stop_ids)
        picker = Picker(sampling, prompts, seeds, width, limits)
        readers = [self._texts.reader(prompt, sampling) for prompt in prompts]
        ends = stop_ids if sampling.ignore_eos else model_ends | stop_ids
        ending = _Ending(readers, ends, picker, room=room, watch=watch)
        with torch.inference_mode():
            self._model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(room),
                    pad_token_id=self._pad,
                    eos_token_id=None,
                    return_dict_in_generate=False,
                ),
                logits_processor=LogitsProcessorList([picker]),
                stopping_criteria=StoppingCriteriaList([ending]),
            )
        return [
            Output(
                text=readers[row].text(tokens, reason),
                token_ids=tuple(tokens),
                finish_reason=reason,
                logprobs=tuple(picker.logprobs[row][: len(tokens)]) if sampling.logprobs is not None else None,
            )
            for row, (tokens, reason) in enumerate(ending.answers())
        ]

    def _room(self, prompt_tokens: int, sampling: Sampling) -> int:
        if self.max_positions is None:
            return sampling.max_tokens
        return max(min(sampling.max_tokens, self.max_positions - prompt_tokens), 1)

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self._model.device
        return ids.to(device), mask.to(device)

    def _pad_id(self) -> int:
        """Padding is masked, so any id with an embedding will do."""
        pad = getattr(self._texts.tokenizer, "pad_token_id", None)
        pad = pad if pad is not None else min(self._ends, default=0)
        return pad if self.vocabulary is None or pad < self.vocabulary else 0

    def _use(self, adapter: str | None) -> None:
        """Switch to one runtime adapter, or to the base model."""
        if not hasattr(self._model, "peft_config"):
            return
        if adapter is None:
            self._model.base_model.disable_adapter_layers()
        else:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(adapter)


class _Ending(StoppingCriteria):
    """Ends each row at an end token, a stop string or its limit, and keeps its tokens until then."""

    def __init__(
        self, readers: Sequence[Reader], ends: frozenset[int], picker: Picker, *, room: Sequence[int], watch: Watch
    ) -> None:
        self._readers = readers
        self._ends = ends
        self._picker = picker
        self._room = room
        self._watch = watch
        self._tokens: list[list[int]] = [[] for _ in room]
        self._reasons: list[FinishReason | None] = [None] * len(room)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:  # noqa: ARG002
        newest = input_ids[:, -1].tolist()
        self._picker.check_finite()  # here, where the device was waited for anyway
        grown = finished = 0
        for row, token in enumerate(newest):
            if self._reasons[row] is not None:
                continue
            self._tokens[row].append(token)
            self._reasons[row] = self._reason(row)
            grown += 1
            finished += self._reasons[row] is not None
        self._watch.step(tokens=grown, answers=finished)
        done = [reason is not None for reason in self._reasons]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def answers(self) -> list[tuple[list[int], FinishReason]]:
        """Each row's tokens and why it ended."""
        return [(tokens, reason or "length") for tokens, reason in zip(self._tokens, self._reasons, strict=True)]

    def _reason(self, row: int) -> FinishReason | None:
        tokens = self._tokens[row]
        if tokens[-1] in self._ends or self._readers[row].stops(tokens):
            return "stop"
        return "length" if len(tokens) >= self._room[row] else None
