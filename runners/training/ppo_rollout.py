"""First half of a PPO update: generate responses, score them, and compute the outputs of old policy and reference."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runners.training.plan import Plan
from runners.training.ppo_math import token_logprobs
from runners.training.ppo_model import Batch, PolicyWithValue, forward_options, response_logits
from runners.training.rewards import Reward, decoded, total
from runners.training.settings import PpoTraining
from runners.training.templates import end_tokens

DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Rollout:
    """Responses and what an update needs of them: (rows, response) each, `scores` (rows,)."""

    batch: Batch
    logprobs: Tensor
    values: Tensor
    reference: Tensor
    scores: Tensor


NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
"""Turns the model's own settings off: with them, completions would not follow the log-probabilities."""


class Roller:
    """Makes rollouts with the unwrapped policy. `reference` None: the policy with its adapter off."""

    def __init__(
        self,
        plan: Plan,
        policy: PolicyWithValue,
        reference: Any,
        tokenizer: Any,
        *,
        rewards: list[Reward],
        as_json: frozenset[str] = frozenset(),
        length: int,
    ) -> None:
        assert isinstance(plan.training, PpoTraining)
        self.temperature = plan.generation.temperature or plan.training.temperature or DEFAULT_TEMPERATURE
        self._policy, self._reference, self._tokenizer, self._rewards = policy, reference, tokenizer, rewards
        self._as_json = as_json
        self._ends = end_tokens(tokenizer)
        self._stops = plan.generation.stops
        self._options = forward_options(policy.policy)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0, "min_p": None}
        self._generation: dict[str, Any] = {
            "max_new_tokens": length,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": self._ends,
            **NEUTRAL,
            **(sampling if plan.generation.do_sample else {"do_sample": False}),
            **({"stop_strings": self._stops, "tokenizer": tokenizer} if self._stops else {}),
        }

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def roll(self, rows: dict[str, list[Any]], device: Any, forward: int) -> Rollout:
        """A rollout for `rows`: the columns of the data, and `ids`, each prompt's tokens.

        Args:
            forward: rows in one forward pass when they are scored.

        Raises:
            RunnerError: a reward failed.
        """
        self._policy.eval()
        prompts = self._padded(rows["ids"], device)
        full = self._policy.policy.generate(**prompts, **self._generation)
        responses = full[:, prompts["input_ids"].shape[1] :]
        texts, mask = self._read(responses)
        batch = Batch(full, torch.cat([prompts["attention_mask"], mask], dim=1), mask)
        columns = decoded({key: each for key, each in rows.items() if key not in ("ids", "prompt")}, self._as_json)
        scores = total(self._rewards, rows["prompt"], texts, columns)
        parts = [batch.rows(index) for index in torch.arange(len(full), device=full.device).split(forward)]
        passes = [self._policy(part, self.temperature) for part in parts]
        return Rollout(
            batch,
            torch.cat([each.logprobs for each in passes]) * mask,
            torch.cat([each.values for each in passes]) * mask,
            torch.cat([self._by_reference(part) for part in parts]) * mask,
            torch.tensor(scores, dtype=torch.float32, device=full.device),
        )

    def _by_reference(self, batch: Batch) -> Tensor:
        policy = self._policy.policy
        plain = contextlib.nullcontext() if self._reference is not None else policy.disable_adapter()
        with plain:
            logits, tokens = response_logits(self._reference or policy, batch, self._options)
        return token_logprobs(logits, tokens, self.temperature)

    def _padded(self, prompts: list[list[int]], device: Any) -> dict[str, Tensor]:
        longest = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        attention = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(attention, device=device),
        }

    def _read(self, responses: Tensor) -> tuple[list[str], Tensor]:
        """Each response's text, and the mask of its tokens, up to and including its end token."""
        pad = self._tokenizer.pad_token_id
        mask = torch.zeros_like(responses)
        texts = []
        for row, tokens in enumerate(responses.tolist()):
            length = next((i for i, token in enumerate(tokens) if token == pad or token in self._ends), len(tokens))
            text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
            stopped = next((stop for stop in self._stops if stop in text), None)
            if length < len(tokens) and tokens[length] in self._ends and stopped is None:
                length += 1
            mask[row, : max(length, 1)] = 1  # after a stop string there are only pad tokens
            texts.append(text if stopped is None else text[: text.index(stopped)])
        return texts, mask
