"""Progress of a run: steps, loss, tokens/s and time left; and the check for a cancel, on all ranks.

One `Meter` a rank. Only the rank that has the task's pipe reports; the others keep step with it.
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from flowmesh.processes.pipe import Cancel
from runners.api import Cancelled, Context, RunnerError
from runners.training.step_notes import StepNotes

MAX_HISTORY = 1000
"""Most points of the loss in a result. Longer runs keep every second, fourth … point."""


class Agreement(Protocol):
    """Returns the largest value of all ranks."""

    def __call__(self, value: int) -> int: ...


def alone(value: int) -> int:
    return value


_SAVE, _STOP, _SAVE_AND_STOP = 1, 2, 3
"""What the ranks agree on at the end of a step; the highest one wins."""


class Meter:
    """Counts a run's steps and tokens, reports them, and checks for a cancel."""

    def __init__(
        self,
        ctx: Context,
        agree: Agreement = alone,
        *,
        scaled: bool = False,
        saves_every_s: float | None = None,
        notes: StepNotes | None = None,
    ) -> None:
        """
        Args:
            scaled: the loss is scaled (fp16): a gradient that overflows is a step left out, and no divergence.
            saves_every_s: `training.save_on_time_s`.
            notes: gets each step, on one rank of each node.
        """
        self._checked = ("reward", "loss", "train_loss", *(() if scaled else ("grad_norm",)))
        self.stopped: Cancelled | None = None
        self.save_due = False
        """Whether every rank writes a checkpoint at the end of this step, because the last one is too old."""
        self._saves_every_s = saves_every_s
        self._notes = notes
        self.history: list[dict[str, float]] = []
        self.last: dict[str, float] = {}
        self.evaluations: list[dict[str, float]] = []
        self.first_step = 0
        self.step = 0
        self.total = 0
        self.tokens: float | None = None
        self.seconds = 0.0
        self._tokens_before = 0.0
        self._tokens_after_s = 0.0
        self._ctx = ctx
        self._agree = agree
        self._began = self._saved = time.monotonic()

    def begin(self, step: int, total: int, tokens: float = 0.0) -> None:
        """Start counting; `step` steps were done by an earlier attempt."""
        self.first_step = self.step = step
        self.total = total
        self._tokens_before = tokens
        self._began = self._saved = time.monotonic()
        if self._notes is not None:
            self._notes.begin(step, total)
        self._report({})

    def must_stop(self) -> Cancelled | None:
        """The cancel, seen by every rank at the same step; decides about `save_due`, too. With several ranks, a
        collective."""
        if self.stopped is None:
            request = self._ctx.cancelled
            level = self._agree(
                (_SAVE if self._is_old() else 0) if request is None else _SAVE_AND_STOP if request.checkpoint else _STOP
            )
            self.save_due = self.save_due or level == _SAVE
            if level > _SAVE:
                reason = request.reason if isinstance(request, Cancel) else "cancelled"
                self.stopped = Cancelled(reason, checkpoint=level == _SAVE_AND_STOP)
        return self.stopped

    def saved(self, step: int) -> None:
        """A whole checkpoint of `step` is on disk."""
        self._saved = time.monotonic()
        self.save_due = False
        if self._notes is not None:
            self._notes.saved(step)

    @property
    def lost_steps(self) -> int | None:
        """Steps that earlier attempts did in vain; None: there was none, or it is noted on another rank."""
        return None if self._notes is None else self._notes.lost

    def _is_old(self) -> bool:
        return self._saves_every_s is not None and time.monotonic() - self._saved >= self._saves_every_s

    def furthest(self, step: int) -> int:
        """The largest `step` of all ranks. A collective."""
        return self._agree(step)

    def advance(self, step: int) -> None:
        """Report that `step` is done."""
        self.step = step
        self.seconds = time.monotonic() - self._began
        if self._notes is not None:
            self._notes.advance(step)
        self._report(self._rates())

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        """Take what the trainer logged at `step`.

        Raises:
            RunnerError: the loss, the gradient or the reward is NaN or infinite.
        """
        found = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
        for key in self._checked:
            if not math.isfinite(found.get(key, 0.0)):
                cause = (
                    "the rewards exceed float32; lower their weight or scale"
                    if key == "reward"
                    else "the training diverged; lower spec.training.learning_rate, or look for bad rows in the data"
                )
                raise RunnerError(f"{key} is {found[key]} at step {step}: {cause}")
        if (tokens := found.get("num_tokens")) is not None:
            self.tokens = tokens - self._tokens_before
            self._tokens_after_s = time.monotonic() - self._began
        if "loss" in found:
            self.history.append(_point(step, found))
            self.last = found
            if len(self.history) > 2 * MAX_HISTORY:
                self.history = self.history[::2]

    def evaluated(self, step: int, numbers: dict[str, Any]) -> None:
        """Record an evaluation at `step`; replaces an earlier one of the same step.

        Raises:
            RunnerError: its loss or reward is NaN or infinite, so that it can be compared with no other.
        """
        found = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
        for key in ("eval_loss", "eval_reward"):
            if not math.isfinite(found.get(key, 0.0)):
                raise RunnerError(f"{key} is {found[key]} at step {step}: look for bad rows in spec.data.eval")
        self.evaluations = [each for each in self.evaluations if each["step"] != step]
        self.evaluations.append({"step": step, **{key: found[key] for key in found if key.startswith("eval_")}})

    def evaluation_at(self, step: int) -> dict[str, float]:
        return next((each for each in self.evaluations if each["step"] == step), {})

    def restore(self, history: list[dict[str, Any]]) -> None:
        """Restore losses and evaluations from a checkpoint's history."""
        self.history = [_point(entry["step"], entry) for entry in history if "loss" in entry]
        for entry in history:
            if "eval_loss" in entry:
                self.evaluated(entry["step"], entry)

    def summary(self, *, samples_a_step: int) -> dict[str, Any]:
        """Metrics of this run. Rates count this attempt's steps only."""
        steps = self.step - self.first_step
        seconds = self.seconds or None
        samples = steps * samples_a_step
        losses = self.history[:: max(1, math.ceil(len(self.history) / MAX_HISTORY))]
        return {
            "steps": self.step,
            "first_step": self.first_step,
            "loss_history": losses,
            **({"eval_history": self.evaluations[-MAX_HISTORY:]} if self.evaluations else {}),
            "final_loss": self.history[-1]["loss"] if self.history else None,
            "steps_per_s": _rate(steps, seconds),
            "samples": samples,
            "samples_per_s": _rate(samples, seconds),
            "tokens": None if self.tokens is None else int(self.tokens),
            "tokens_per_s": _rate(self.tokens, seconds),
            "last": {key: value for key, value in self.last.items() if key not in ("loss", "num_tokens")},
        }

    def _rates(self) -> dict[str, float]:
        done = self.step - self.first_step
        rates = {"eta_s": self.seconds / done * (self.total - self.step)} if done else {}
        if "loss" in self.last:
            rates["loss"] = self.last["loss"]
        if self.tokens and self._tokens_after_s:  # counted when the trainer logs, not at every step
            rates["tokens_per_s"] = self.tokens / self._tokens_after_s
        return rates

    def _report(self, numbers: dict[str, float]) -> None:
        try:
            self._ctx.progress(self.step, self.total, "steps", **numbers)
        except Cancelled:
            # must_stop() handles a cancel frame, so that all ranks stop at the same step.
            # A signal has no frame, and takes effect at once.
            if self._ctx.cancelled is None:
                raise


def _point(step: int, numbers: dict[str, float]) -> dict[str, float]:
    return {"step": step, **{key: numbers[key] for key in ("loss", "reward", "kl") if key in numbers}}


def _rate(count: float | None, seconds: float | None) -> float | None:
    return None if count is None or not seconds else round(count / seconds, 4)
