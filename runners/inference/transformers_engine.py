"""The Transformers engine: one model, batches of left-padded prompts of similar length.

An answer does not depend on its batch. Batches are limited by tokens of key-value cache; one that still runs out of
memory is halved and tried again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from runners.api import BadRequest
from runners.gpu_memory import is_shortage
from runners.inference.batches import Batch, Need, Row, plan
from runners.inference.engine import (
    Completion,
    Finished,
    FinishReason,
    GpuOutOfMemory,
    Output,
    Request,
    Same,
    TokenLogprob,
    Watch,
)
from runners.inference.options import Sampling
from runners.inference.sampling import Limits, NotFinite, Picker, Pickers
from runners.inference.tokens import Reader, Texts
from runners.inference.vision import Vision, by_pixels
from runners.models.limits import embedding_rows, positions
from runners.models.sources import Source
from runners.models.weights import first_not_finite, not_finite

Grown = Callable[[int, int, Sequence[int], Sequence[TokenLogprob]], None]
"""Called on the caller's thread with a request's position, the number of one of its answers, all tokens of that answer
so far, and the logprobs that the request asks for."""


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

    @property
    def model(self) -> Any:
        """Of Transformers."""
        return self._model

    def check(self, sampling: Sampling, where: str) -> None:
        """See `Engine.check`."""
        if sampling.json_schema is not None:
            raise BadRequest(f"{where}.json_schema: only vLLM can keep answers to a schema; set spec.engine to 'vllm'")

    def describe(self) -> dict[str, Any]:
        model = self._model
        return {"engine": self.name, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}

    def generate(
        self, requests: Sequence[Request], watch: Watch, finished: Finished, grown: Grown | None = None
    ) -> None:
        """See `Engine.generate`. Batches have one adapter, and prompts and answers of similar length; each request has
        sampling of its own.

        Args:
            grown: called with the answers that go on, after each step. A batch that is generated again begins anew.
        """
        work = _Work(requests, watch, finished, grown)
        try:
            for numbers in self._groups(requests):
                self._answer(numbers, work)
        except NotFinite:
            where, shown = (self._source.where, self._source.shown) if self._source else ("model", "the model")
            raise BadRequest(not_finite(where, shown, str(self._model.dtype), first_not_finite(self._model))) from None

    @staticmethod
    def _groups(requests: Sequence[Request]) -> list[list[int]]:
        """The requests that may share a batch: those of one adapter, with images or without."""
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault((request.adapter or "", request.pictures is not None), []).append(number)
        return [groups[kind] for kind in sorted(groups)]

    def _answer(self, numbers: list[int], work: _Work) -> None:
        requests = work.requests
        self._use(requests[numbers[0]].adapter)
        needs = [
            Need(
                number,
                len(requests[number].token_ids),
                requests[number].sampling.max_tokens,
                requests[number].sampling.n,
            )
            for number in numbers
        ]
        batches = plan(
            needs, max_positions=self.max_positions, batch_tokens=self._batch_tokens, batch_rows=self._batch_rows
        )
        for batch in batches:
            for part in by_pixels(batch, lambda row: requests[row.request].pictures):
                self._run(part, work)

    def _run(self, batch: Batch, work: _Work) -> None:
        tokens = work.watch.tokens
        try:
            self._generate(batch, work)
            return
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            shortage = str(error)
        # Outside the handler, so that the traceback no longer references the tensors that did not fit.
        gc.collect()
        torch.cuda.empty_cache()
        left = [row for row in batch if row not in work.answers]
        work.watch.rewind(tokens=tokens + sum(len(work.answers[row].token_ids) for row in batch if row not in left))
        if len(batch) == 1:
            length = len(work.requests[batch[0].request].token_ids)
            raise GpuOutOfMemory(
                f"the GPU's memory does not hold one prompt of {length} tokens and its answer: "
                f"{shortage.splitlines()[0]}"
            )
        self._batch_rows = max(len(batch) // 2, 1)
        half = (len(left) + 1) // 2
        for part in (left[:half], left[half:]):
            if part:
                self._run(part, work)

    def _generate(self, batch: Batch, work: _Work) -> None:
        requests = [work.requests[row.request] for row in batch]
        prompts = [request.token_ids for request in requests]
        resolved = Same(self._texts.resolved)
        samplings = [resolved(request.sampling) for request in requests]
        width = max(map(len, prompts))
        room = [self._room(len(prompt), each) for prompt, each in zip(prompts, samplings, strict=True)]
        model_ends = self._ends.union(requests[0].ends)  # a batch has one adapter
        picker = Pickers(
            [(rows, self._picker(batch, prompts, samplings, rows, width, model_ends)) for rows in _kinds(samplings)]
        )
        readers = [self._texts.reader(prompt, each) for prompt, each in zip(prompts, samplings, strict=True)]
        ends = [frozenset(each.stop_token_ids) | (frozenset() if each.ignore_eos else model_ends) for each in samplings]

        def ended(at: int, tokens: list[int], reason: FinishReason) -> None:
            with_logprobs = samplings[at].logprobs is not None
            work.answered(
                batch[at],
                Output(
                    text=readers[at].text(tokens, reason),
                    token_ids=tuple(tokens),
                    finish_reason=reason,
                    logprobs=tuple(picker.logprobs(at)[: len(tokens)]) if with_logprobs else None,
                ),
            )

        def grown(at: int, tokens: Sequence[int]) -> None:
            if work.grown is not None:
                asked = samplings[at].logprobs is not None
                work.grown(batch[at].request, batch[at].copy, tokens, picker.logprobs(at) if asked else ())

        ending = _Ending(readers, ends, picker, room=room, watch=work.watch, ended=ended, grown=grown)
        inputs = self._inputs(requests)
        with torch.inference_mode():
            self._model.generate(
                **inputs,
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

    def _picker(  # noqa: PLR0917
        self,
        batch: Batch,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        rows: Sequence[int],
        width: int,
        model_ends: frozenset[int],
    ) -> Picker:
        """The picker of some rows, whose sampling differs in seed and max_tokens at most."""
        shared = samplings[rows[0]]
        seeds = [samplings[row].seed for row in rows]
        own = [None if seed is None else seed + batch[row].copy for row, seed in zip(rows, seeds, strict=True)]
        limits = Limits(self._texts.bad_word_ids(shared.bad_words), model_ends.union(shared.stop_token_ids))
        return Picker(shared, [prompts[row] for row in rows], own, width, limits)

    def _room(self, prompt_tokens: int, sampling: Sampling) -> int:
        if self.max_positions is None:
            return sampling.max_tokens
        return max(min(sampling.max_tokens, self.max_positions - prompt_tokens), 1)

    def _inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The model's inputs for a batch, whose requests all have images, or none."""
        pictures = [request.pictures for request in requests if request.pictures is not None]
        if not pictures:
            input_ids, mask = self._pad_left([request.token_ids for request in requests])
            return {"input_ids": input_ids, "attention_mask": mask}
        assert isinstance(self._texts, Vision), "it encoded them"
        model = self._model
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in self._texts.batch(pictures).items()
        }

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


def _kinds(samplings: Sequence[Sampling]) -> list[list[int]]:
    """The rows whose sampling is the same, seed and max_tokens aside."""
    alike = Same(lambda each: msgspec.structs.replace(each, seed=None, max_tokens=0))
    kinds: list[tuple[Sampling, list[int]]] = []
    for row, sampling in enumerate(samplings):
        kind = alike(sampling)
        rows = next((rows for known, rows in kinds if known is kind or known == kind), None)
        if rows is None:
            rows = []
            kinds.append((kind, rows))
        rows.append(row)
    return [rows for _, rows in kinds]


class _Work:
    """The requests of one call, and the answers to them so far."""

    def __init__(self, requests: Sequence[Request], watch: Watch, finished: Finished, grown: Grown | None) -> None:
        self.requests = requests
        self.watch = watch
        self.grown = grown
        self.answers: dict[Row, Output] = {}
        self._finished = finished

    def answered(self, row: Row, output: Output) -> None:
        """Take an answer, and hand the request's answers out if this was its last one."""
        self.answers[row] = output
        copies = [Row(row.request, copy) for copy in range(self.requests[row.request].sampling.n)]
        if all(each in self.answers for each in copies):
            self._finished(row.request, Completion(tuple(self.answers[each] for each in copies)))


class _Ending(StoppingCriteria):
    """Ends each row at an end token, a stop string or its limit, and hands its tokens out then."""

    def __init__(
        self,
        readers: Sequence[Reader],
        ends: Sequence[frozenset[int]],
        picker: Pickers,
        *,
        room: Sequence[int],
        watch: Watch,
        ended: Callable[[int, list[int], FinishReason], None],
        grown: Callable[[int, list[int]], None],
    ) -> None:
        self._readers = readers
        self._ends = ends
        self._picker = picker
        self._room = room
        self._watch = watch
        self._ended = ended
        self._grown = grown
        self._tokens: list[list[int]] = [[] for _ in room]
        self._done = [False] * len(room)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:  # noqa: ARG002
        newest = input_ids[:, -1].tolist()
        self._picker.check_finite()  # here, where the device was waited for anyway
        grown = 0
        for row, token in enumerate(newest):
            if self._done[row]:
                continue
            self._tokens[row].append(token)
            grown += 1
            reason = self._reason(row)
            if reason is not None:
                self._done[row] = True
                self._ended(row, self._tokens[row], reason)
            else:
                self._grown(row, self._tokens[row])
        self._watch.step(tokens=grown)
        return torch.tensor(self._done, dtype=torch.bool, device=input_ids.device)

    def _reason(self, row: int) -> FinishReason | None:
        tokens = self._tokens[row]
        if tokens[-1] in self._ends[row] or self._readers[row].stops(tokens):
            return "stop"
        return "length" if len(tokens) >= self._room[row] else None
