"""The policy with a value head on its last hidden state: one pass gives a response's log-probabilities and values."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runners.training.ppo_math import entropy, token_logprobs


class Batch(NamedTuple):
    """Prompts, padded on the left, each with its response, padded on the right."""

    ids: Tensor
    """(rows, prompt + response)"""
    attention: Tensor
    mask: Tensor
    """(rows, response): 1 where a token is the response's."""

    def rows(self, index: Tensor) -> Batch:
        return Batch(self.ids[index], self.attention[index], self.mask[index])


class Pass(NamedTuple):
    """The policy's outputs for the responses, each (rows, response)."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor


class PolicyWithValue(nn.Module):
    """A causal language model and a linear value head that share the backbone."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        head = policy.get_output_embeddings()
        hidden = policy.config.get_text_config().hidden_size
        self.value = nn.Linear(hidden, 1, dtype=torch.float32, device=head.weight.device)
        nn.init.normal_(self.value.weight, std=(hidden + 1) ** -0.5)
        nn.init.zeros_(self.value.bias)
        self._hidden: Tensor | None = None
        head.register_forward_pre_hook(self._see)  # the head's input: the last hidden state of the kept tokens
        self._options = forward_options(policy)

    def _see(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._hidden = inputs[0]

    def forward(self, batch: Batch, temperature: float) -> Pass:
        logits, tokens = response_logits(self.policy, batch, self._options)
        assert self._hidden is not None, "the head has been called"
        hidden, self._hidden = self._hidden, None
        states = hidden[:, -logits.shape[1] - 1 : -1].float()
        with torch.autocast(states.device.type, enabled=False):
            values = self.value(states).squeeze(-1)
        return Pass(token_logprobs(logits, tokens, temperature), values, entropy(logits, temperature))


def forward_options(model: Any) -> frozenset[str]:
    """Optional arguments of `forward` that this model has."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(bare.forward).parameters
    return frozenset(name for name in ("position_ids", "logits_to_keep") if name in known)


def response_logits(model: Any, batch: Batch, options: frozenset[str]) -> tuple[Tensor, Tensor]:
    """The logits that each response token was sampled from, and those tokens."""
    length = batch.mask.shape[1]
    more: dict[str, Any] = {}
    if "position_ids" in options:
        more["position_ids"] = (batch.attention.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in options:
        more["logits_to_keep"] = length + 1
    logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False, **more).logits
    return logits[:, -length - 1 : -1], batch.ids[:, -length:]
