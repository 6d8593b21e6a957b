"""PPO's batch sizes: completions for each update, optimizer step and forward pass; and the order of rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from runners.api import BadRequest
from runners.training.plan import Plan
from runners.training.settings import PpoTraining


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of completions on each rank."""

    update: int
    """Generated and scored before the policy changes."""
    step: int
    """For one optimizer step."""
    forward: int
    """For one forward pass."""

    @property
    def steps_a_pass(self) -> int:
        return self.update // self.step


def sizes(plan: Plan, warn: Callable[[str], None] = lambda _text: None) -> Sizes:
    """The task's batch_size, mini_batch_size, num_mini_batches, per_device_train_batch_size and
    gradient_accumulation_steps as one set of sizes.

    `mini_batch_size` is for one optimizer step. Where the accumulation does not divide it, it is for one forward pass,
    as in TRL's earlier trainer, and the step takes as many of them as the accumulation says and an update holds.

    Args:
        warn: gets what was read so.

    Raises:
        BadRequest: they contradict each other.
    """
    training = plan.training
    assert isinstance(training, PpoTraining)
    where = "spec.training"
    parts = training.num_mini_batches
    accumulate = training.gradient_accumulation_steps
    forward = training.per_device_train_batch_size
    step = training.mini_batch_size
    if step is not None and accumulate > 1 and (forward == step if forward is not None else step % accumulate):
        forward = step
        steps, accumulate = accumulate, _fitting(step, accumulate, training.batch_size)
        step = forward * accumulate
        fitted = "" if steps == accumulate else f", lowered to {accumulate} to fit batch_size {training.batch_size}"
        warn(
            f"{where}.mini_batch_size: read as {forward} completions of one pass, with gradient_accumulation_steps "
            f"{steps}{fitted}: {step} for an optimizer step"
        )
    if step is None and forward is not None and training.batch_size is None:
        step = forward * accumulate
    update = training.batch_size
    if update is None:
        update = step * (parts or 1) if step is not None else plan.kind.batch_size
    if step is None:
        if update % (parts or 1):
            raise BadRequest(f"{where}.num_mini_batches: {parts} does not divide batch_size {update}")
        step = update // (parts or 1)
    if update % step:
        raise BadRequest(f"{where}.mini_batch_size: {step} does not divide batch_size {update}")
    if parts is not None and update // step != parts:
        raise BadRequest(
            f"{where}.num_mini_batches: {parts}, but batch_size {update} / mini_batch_size {step} is {update // step}"
        )
    if forward is None:
        if accumulate > step:
            warn(f"{where}.gradient_accumulation_steps: {accumulate}, lowered to the {step} completions of a step")
            accumulate = step
        if step % accumulate:
            raise BadRequest(
                f"{where}.gradient_accumulation_steps: {accumulate} does not divide mini_batch_size {step}"
            )
        forward = step // accumulate
    if step % forward:
        raise BadRequest(f"{where}.per_device_train_batch_size: {forward} does not divide mini_batch_size {step}")
    if accumulate not in (1, step // forward):
        raise BadRequest(
            f"{where}.gradient_accumulation_steps: {accumulate}, but mini_batch_size {step} / "
            f"per_device_train_batch_size {forward} is {step // forward}"
        )
    return Sizes(update=update, step=step, forward=forward)


def _fitting(forward: int, accumulate: int, update: int | None) -> int:
    """The most passes, up to `accumulate`, whose completions divide those of an update; 1 where none do."""
    if update is None:
        return accumulate
    return next((each for each in range(accumulate, 1, -1) if update % (forward * each) == 0), 1)


def updates(plan: Plan, rows: int, per_update: int) -> int:
    """Number of updates that the task asks for.

    Args:
        per_update: completions of all ranks.
    """
    limit = plan.training.step_limit
    if limit is not None:
        return int(limit)
    return max(1, math.ceil(plan.training.num_train_epochs * rows / per_update))


class Order:
    """An endless order of rows, shuffled for each epoch by the seed. It depends on the position alone, so that a
    resumed run continues it."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._epochs: dict[int, list[int]] = {}

    def take(self, start: int, count: int) -> list[int]:
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self._rows)
        if epoch not in self._epochs:
            order = list(range(self._rows))
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1} | {epoch: order}
        return self._epochs[epoch][index]
