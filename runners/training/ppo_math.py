"""PPO's arithmetic: advantages, clipped losses, divergence. Pure functions of tensors, checked by hand in the tests.

Shapes: everything is (rows, tokens), right-padded, with a mask of 1 where a token is the response's. After Schulman
et al., "Proximal Policy Optimization Algorithms" (2017) and "High-Dimensional Continuous Control Using Generalized
Advantage Estimation" (2016).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of each of `tokens` (rows, n) under `logits` (rows, n, vocabulary)."""
    scaled = logits.float() / temperature
    picked = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return picked - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The entropy of each token's distribution, in nats."""
    logs = (logits.float() / temperature).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Each token's reward: minus its share of the divergence from the reference; the last also has the row's score.

    Args:
        scores: (rows,).
    """
    rewards = -kl_coef * (logprobs - reference) * mask
    last = mask.sum(-1).long() - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores.to(rewards.dtype)
    return rewards


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and the returns that the values should learn.

    A response ends at its last token: nothing of value comes after it, and padding has no part in it.
    """
    steps = rewards.shape[1]
    values = values * mask
    found = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(steps)):
        following = values[:, t + 1] if t + 1 < steps else torch.zeros_like(ahead)
        surprise = rewards[:, t] + gamma * following - values[:, t]
        ahead = (surprise + gamma * lam * ahead) * mask[:, t]
        found[:, t] = ahead
    return found, (found + values) * mask


class Moments(NamedTuple):
    """Count, sum and sum of squares, which can be added over ranks."""

    count: Tensor
    total: Tensor
    squares: Tensor


def moments(values: Tensor, mask: Tensor) -> Moments:
    kept = values * mask
    return Moments(mask.sum(), kept.sum(), (kept**2).sum())


def whiten(values: Tensor, mask: Tensor, over: Moments, *, shift: bool = True) -> Tensor:
    """`values` scaled to variance 1 (and mean 0 with `shift`) by the moments of all ranks."""
    mean = over.total / over.count
    variance = (over.squares / over.count - mean**2).clamp(min=0) * over.count / (over.count - 1).clamp(min=1)
    scaled = (values - mean) / (variance.sqrt() + 1e-8)
    return (scaled if shift else scaled + mean) * mask


class PolicyLoss(NamedTuple):
    """Sums over tokens; divide by the number of tokens of all ranks."""

    loss: Tensor
    clipped: Tensor
    """Number of clipped tokens."""
    divergence: Tensor
    """Estimate of KL(old, new): (ratio - 1) - log ratio, never negative."""


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, cliprange: float) -> PolicyLoss:
    """The clipped surrogate objective: the larger loss of the ratio and the ratio clipped to 1 ± cliprange."""
    log_ratio = (new - old) * mask
    ratio = log_ratio.exp()
    free = -advantage * ratio
    held = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    return PolicyLoss(
        (torch.max(free, held) * mask).sum(),
        ((held > free) * mask).sum().detach(),
        ((ratio - 1 - log_ratio) * mask).sum().detach(),
    )


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Half the squared error, summed; the larger loss of the new value and the one clipped to old ± `cliprange`."""
    near = old + (new - old).clamp(-cliprange, cliprange)
    return 0.5 * (torch.max((new - returns) ** 2, (near - returns) ** 2) * mask).sum()
