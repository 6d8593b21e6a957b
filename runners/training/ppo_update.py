"""Second half of a PPO update: passes over a rollout, in optimizer steps."""

from __future__ import annotations

import contextlib
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runners.training import ppo_math as math
from runners.training.ppo_batches import Sizes
from runners.training.ppo_model import PolicyWithValue
from runners.training.ppo_rollout import Rollout
from runners.training.settings import PpoArgs, PpoTraining

KL_SLACK = 1.5
"""Passes end early when the divergence exceeds this times `target_kl`, as in other PPO implementations."""


class Lesson(NamedTuple):
    """A rollout with its advantages and returns; (rows, response) each."""

    rollout: Rollout
    mask: Tensor
    advantage: Tensor
    returns: Tensor
    temperature: float


class Updater:
    """Updates the policy. `model` is the policy as wrapped by Accelerate."""

    def __init__(
        self,
        training: PpoTraining,
        args: PpoArgs,
        sizes: Sizes,
        *,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        schedule: Any,
    ) -> None:
        self._training, self._args, self._sizes = training, args, sizes
        self._accelerator, self._model, self._optimizer, self._schedule = accelerator, model, optimizer, schedule

    def learn(self, rollout: Rollout, temperature: float, seed: str) -> dict[str, float]:
        """One update; returns its numbers, over all ranks."""
        lesson = self._prepare(rollout, temperature)
        order = random.Random(seed)
        sums, tokens, passes = torch.zeros(5, device=lesson.mask.device), torch.zeros((), device=lesson.mask.device), 0
        self._model.train()
        for _ in range(self._training.ppo_epochs):
            passes += 1
            step_sums, step_tokens = self._pass(lesson, order)
            sums, tokens = sums + step_sums, tokens + step_tokens
            limit = self._training.target_kl
            if limit is not None and float(step_sums[3] / step_tokens) > KL_SLACK * limit:
                break
        loss, value, clipped, divergence, spread = (sums / tokens).tolist()
        return {
            "loss": loss + self._args.vf_coef * value - self._args.entropy_coef * spread,
            "policy_loss": loss,
            "value_loss": value,
            "clip_fraction": clipped,
            "approx_kl": divergence,
            "entropy": spread,
            "passes": passes,
            **self._of_rollout(rollout, lesson.mask),
        }

    def _prepare(self, rollout: Rollout, temperature: float) -> Lesson:
        mask, scores = rollout.batch.mask.float(), rollout.scores
        if self._args.reward_clip is not None:
            scores = scores.clamp(-self._args.reward_clip, self._args.reward_clip)
        rewards = math.token_rewards(scores, rollout.logprobs, rollout.reference, mask, self._training.kl_coef)
        if self._args.whiten_rewards:
            rewards = math.whiten(rewards, mask, self._all_moments(rewards, mask), shift=False)
        advantage, returns = math.advantages(rewards, rollout.values, mask, self._args.gamma, self._args.lam)
        advantage = math.whiten(advantage, mask, self._all_moments(advantage, mask))
        return Lesson(rollout, mask, advantage, returns, temperature)

    def _pass(self, lesson: Lesson, order: random.Random) -> tuple[Tensor, Tensor]:
        """All rows once; sums over the tokens of all ranks: policy loss, value loss, clipped, divergence, entropy."""
        mask = lesson.mask
        rows = list(range(len(mask)))
        order.shuffle(rows)
        steps = torch.tensor(rows, device=mask.device).split(self._sizes.step)
        counts = self._accelerator.reduce(torch.stack([mask[step].sum() for step in steps]), "sum")
        sums = torch.zeros(5, device=mask.device)
        for step, count in zip(steps, counts, strict=True):
            parts = step.split(self._sizes.forward)
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with contextlib.nullcontext() if last else self._accelerator.no_sync(self._model):
                    sums += self._backward(lesson, part, count)
            self._accelerator.clip_grad_norm_(self._model.parameters(), self._args.max_grad_norm)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        return self._accelerator.reduce(sums, "sum"), counts.sum()

    def _backward(self, lesson: Lesson, rows: Tensor, count: Tensor) -> Tensor:
        """The gradient of these rows' share of a step whose tokens, on all ranks, are `count`."""
        old, kept = lesson.rollout, lesson.mask[rows]
        with self._accelerator.autocast():
            new = self._model(old.batch.rows(rows), lesson.temperature)
        args = self._args
        policy = math.policy_loss(new.logprobs, old.logprobs[rows], lesson.advantage[rows], kept, args.cliprange)
        value = math.value_loss(new.values, old.values[rows], lesson.returns[rows], kept, args.cliprange_value)
        spread = (new.entropy * kept).sum()
        loss = policy.loss + args.vf_coef * value - args.entropy_coef * spread
        # DDP averages over ranks; this factor makes it the sum over all tokens divided by their number.
        self._accelerator.backward(loss * self._accelerator.num_processes / count)
        return torch.stack(
            [policy.loss.detach(), value.detach(), policy.clipped.float(), policy.divergence, spread.detach()]
        )

    def _of_rollout(self, rollout: Rollout, mask: Tensor) -> dict[str, float]:
        divergence = ((rollout.logprobs - rollout.reference) * mask).sum()
        found = torch.stack([rollout.scores.sum(), divergence, mask.sum(), rollout.batch.attention.sum().float()])
        rows = len(mask) * self._accelerator.num_processes
        score, kl, written, seen = self._accelerator.reduce(found, "sum").tolist()
        return {"reward": score / rows, "kl": kl / rows, "response_tokens": written / rows, "new_tokens": seen}

    def _all_moments(self, values: Tensor, mask: Tensor) -> math.Moments:
        return math.Moments(*self._accelerator.reduce(torch.stack(math.moments(values, mask)), "sum"))


def trainable(model: PolicyWithValue) -> list[Any]:
    return [weight for weight in model.parameters() if weight.requires_grad]
