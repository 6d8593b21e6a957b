"""Picks the next token of every row of a Transformers batch, by vLLM's rules.

A LogitsProcessor that masks all tokens but the chosen one, so that greedy `generate` takes it. Seeds then belong to
requests, penalties ignore padding, and an answer does not depend on the other prompts of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from transformers import LogitsProcessor

from runners.inference.engine import TokenLogprob
from runners.inference.options import Sampling


class NotFinite(ArithmeticError):
    """The model computed NaN or infinity where the score of its best token should be."""


class Limits(msgspec.Struct, frozen=True):
    """What a task forbids of the next token, in ids of its model's tokenizer."""

    bad_words: Sequence[Sequence[int]] = ()
    """Sequences whose last token is forbidden where the others were just generated."""
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer, forbidden until it has `min_tokens`."""


class Picker(LogitsProcessor):
    """Order of the steps, as in vLLM: logprobs of the model itself, bad words, min_tokens, logit_bias, penalties,
    temperature, top-k, top-p, draw."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int | None],
        width: int,
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            prompts: token ids of each row, without padding.
            seeds: one per row; None: torch's global generator.
            width: length of the padded prompts; later tokens are generated ones.
        """
        self._sampling = sampling
        self._prompts = prompts
        self._seeds = seeds
        self._width = width
        self._limits = limits or Limits()
        self._finite: torch.Tensor | None = None
        self._generators: list[torch.Generator | None] = []
        self._prompt_seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        sampling = self._sampling
        finite = scores.amax(dim=-1).isfinite().all()  # amax propagates NaN
        self._finite = finite if self._finite is None else self._finite & finite
        if sampling.greedy and not self._limited and not self._penalised and sampling.logprobs is None:
            return scores
        raw = torch.log_softmax(scores, dim=-1) if sampling.logprobs is not None else None
        scores = self._penalise(input_ids, self._limit(input_ids, scores))
        tokens = scores.argmax(dim=-1) if sampling.greedy else self._draw(scores)
        if raw is not None:
            self._note(raw, tokens)
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, tokens[:, None], 0.0)

    def check_finite(self) -> None:
        """Raises NotFinite where a score of the last steps was not finite. Waits for the device."""
        if self._finite is not None and not bool(self._finite):
            raise NotFinite

    @property
    def _limited(self) -> bool:
        s = self._sampling
        return bool(self._limits.bad_words or s.min_tokens or s.logit_bias)

    def _limit(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._limited:
            return scores
        scores = scores.clone()
        for word in self._limits.bad_words:
            scores[:, word[-1]].masked_fill_(self._ends_with(input_ids, word[:-1]), float("-inf"))
        if input_ids.shape[1] - self._width < self._sampling.min_tokens:
            scores[:, [each for each in self._limits.ends if each < scores.shape[-1]]] = float("-inf")
        if self._sampling.logit_bias:
            ids = torch.tensor(list(self._sampling.logit_bias), device=scores.device)
            scores[:, ids] += torch.tensor(list(self._sampling.logit_bias.values()), device=scores.device)
        return scores

    def _ends_with(self, input_ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Which rows have just generated these tokens."""
        rows = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if not tokens:
            return rows
        if input_ids.shape[1] - self._width < len(tokens):
            return ~rows
        return (input_ids[:, -len(tokens) :] == torch.tensor(tokens, device=input_ids.device)).all(dim=-1)

    @property
    def _penalised(self) -> bool:
        s = self._sampling
        return s.presence_penalty != 0 or s.frequency_penalty != 0 or s.repetition_penalty != 1

    def _penalise(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Presence and frequency count what was generated; repetition also counts the prompt."""
        if not self._penalised:
            return scores
        sampling = self._sampling
        if self._counts is None or self._prompt_seen is None:
            self._counts = torch.zeros_like(scores)
            self._prompt_seen = torch.zeros_like(scores, dtype=torch.bool)
            for row, prompt in enumerate(self._prompts):
                self._prompt_seen[row, torch.tensor(prompt, device=scores.device)] = True
        if input_ids.shape[1] > self._width:
            newest = input_ids[:, -1:]
            self._counts.scatter_add_(1, newest, torch.ones_like(newest, dtype=self._counts.dtype))
        generated = self._counts > 0
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            seen = generated | self._prompt_seen
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        scores = scores - sampling.frequency_penalty * self._counts
        return scores - sampling.presence_penalty * generated.to(scores.dtype)

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        scores = scores / self._sampling.temperature
        scores = keep_top(scores, self._sampling.top_k, self._sampling.top_p)
        probabilities = torch.softmax(scores, dim=-1)
        noise = torch.empty_like(probabilities)
        if not self._generators:
            self._generators = [self._generator(seed, scores.device) for seed in self._seeds]
        if all(generator is None for generator in self._generators):
            noise.exponential_()
        else:
            for row, generator in enumerate(self._generators):
                noise[row].exponential_(generator=generator)
        # argmax of p / e with exponential e draws each token with its probability, without a host round trip.
        return probabilities.div_(noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(dim=-1)

    @staticmethod
    def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
        return None if seed is None else torch.Generator(device=device).manual_seed(seed)

    def _note(self, raw: torch.Tensor, tokens: torch.Tensor) -> None:
        picked = raw.gather(1, tokens[:, None])[:, 0].tolist()
        count = min(self._sampling.logprobs or 0, raw.shape[-1])
        best = raw.topk(count, dim=-1) if count else None
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), picked, strict=True)):
            top = () if best is None else tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
            self.logprobs[row].append(TokenLogprob(token, logprob, top))


class Pickers(LogitsProcessor):
    """Pickers for the rows of a batch whose requests have different sampling."""

    def __init__(self, parts: Sequence[tuple[Sequence[int], Picker]]) -> None:
        """
        Args:
            parts: rows, and the picker made for them. Each row is in one part.
        """
        self._parts = parts
        self._places = {row: (picker, place) for rows, picker in parts for place, row in enumerate(rows)}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(self._parts) == 1:
            return self._parts[0][1](input_ids, scores)
        picked = torch.empty_like(scores)
        for rows, picker in self._parts:
            at = torch.tensor(rows, device=scores.device)
            picked[at] = picker(input_ids[at], scores[at])
        return picked

    def check_finite(self) -> None:
        """Raises NotFinite where a score of the last steps was not finite. Waits for the device."""
        for _, picker in self._parts:
            picker.check_finite()

    def logprobs(self, row: int) -> list[TokenLogprob]:
        """Of a row's tokens so far, where its request asks for them."""
        picker, place = self._places[row]
        return picker.logprobs[place]


def keep_top(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Mask all but the `top_k` best scores (0: all), and of these all but the fewest that sum up to `top_p`.

    Args:
        scores: rows × vocabulary.
    """
    if 0 < top_k < scores.shape[-1]:
        worst = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < worst, float("-inf"))
    if top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        below = ascending.softmax(dim=-1).cumsum(dim=-1)
        drop = below <= 1.0 - top_p
        drop[:, -1] = False  # the best one always stays
        scores = scores.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    return scores
