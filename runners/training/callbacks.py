"""Connects a `Meter` to transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from runners.training.progress import Meter


class NothingLeft(Exception):
    """Raised when the checkpoint is already at the last step. The trainer itself would do one more step first."""


class MeterCallback(TrainerCallback):
    """Reports each step, and stops the trainer between two steps on a cancel."""

    def __init__(self, meter: Meter, *, counts_tokens_over_lives: bool) -> None:
        self._meter = meter
        self._over_lives = counts_tokens_over_lives

    def on_train_begin(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        tokens = state.num_input_tokens_seen if self._over_lives else 0
        self._meter.restore(state.log_history)
        self._meter.begin(state.global_step, state.max_steps, tokens)
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_log(self, _args: Any, state: TrainerState, _control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if logs:
            self._meter.log(state.global_step, logs)

    def on_evaluate(
        self, _args: Any, state: TrainerState, _control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        self._meter.evaluated(state.global_step, metrics or {})

    def on_prediction_step(self, *_args: Any, **_: Any) -> None:
        stopped = self._meter.must_stop()
        if stopped is not None and not stopped.checkpoint:
            raise stopped

    def on_substep_end(self, _args: Any, _state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        return self._stop(control)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        self._meter.advance(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the result contains the last loss
            if args.eval_strategy != "no":  # and the evaluation of the last weights
                control.should_evaluate = True
                control.should_save = control.should_save or args.load_best_model_at_end
        stopped = self._stop(control)
        control.should_save = control.should_save or self._meter.save_due
        return stopped

    def on_save(self, _args: Any, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self._meter.saved(state.global_step)

    def _stop(self, control: TrainerControl) -> TrainerControl:
        if stopped := self._meter.must_stop():
            control.should_training_stop = True
            control.should_save = control.should_save or stopped.checkpoint
        return control
