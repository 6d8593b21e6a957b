"""sft, lora_sft, dpo, kto, reward, grpo, rloo: TRL's trainers, built from a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback

from runners.api import BadRequest, MissingDependency, RunnerError
from runners.training import arguments, evaluating, models, nodes, packing, prompts, rewards, saving, sharding, tracking
from runners.training.bounds import Bounds
from runners.training.callbacks import MeterCallback, NothingLeft
from runners.training.plan import Plan
from runners.training.preparing import Prepared
from runners.training.settings import EvaluatedTraining
from runners.training.setup import Setup
from runners.training.tracking import NoteCallback


class TrlJob:
    """A TRL trainer with everything loaded."""

    def __init__(self, setup: Setup) -> None:
        self._plan, self._ctx = plan, ctx = setup.plan, setup.ctx
        layout, device = setup.layout, setup.device
        self.sharding = sharding.pick(plan, ctx, layout, device)
        nodes.check_shared(self.sharding.name, shared=setup.parts_together)
        ctx.log.info("sharding: %s", self.sharding.name)
        self.tracking = tracking.begin(plan, ctx, setup.start)
        config = arguments.build(plan, ctx, layout, device, self.sharding)  # before the model: ZeRO-3 loads by it
        config.run_name = config.run_name or self.tracking.run
        if "project" not in plan.training.trainer_args:
            config.project = tracking.PROJECT  # trackio's; the other trackers read their environment variables
        self.start = start = setup.start
        tokenizer = models.load_tokenizer(plan, start)
        rows = evaluating.load(plan, ctx, setup.fetched)
        for each in rows.values():
            prompts.check_chat(each, tokenizer, start)
        extra: dict[str, Any] = {}
        if plan.kind.rewarded:
            room = plan.training.max_seq_length - config.max_completion_length
            rows = {name: prompts.fit(each, tokenizer, room, ctx) for name, each in rows.items()}
            found = rewards.load(plan, ctx, device.name, rows["train"])
            for each in rows.values():
                rewards.check_answers(plan, ctx, each)
            extra["reward_funcs"] = [rewards.for_trl(reward, rows["train"].as_json) for reward in found]
            if config.reward_weights is None:
                config.reward_weights = [reward.weight for reward in found]
        model = models.load_model(plan, start, device, tokenizer)
        bounds = Bounds(model, tokenizer)
        if plan.kind.rewarded:
            for each in rows.values():
                prompts.check_bounds(each, tokenizer, bounds, config.max_completion_length)
        prepared = Prepared(plan, ctx, rows, bounds)
        if plan.lora is not None and start.adapter is None:
            extra["peft_config"] = models.lora_config(plan)
        if plan.kind.reference:
            # for the reference that the trainer loads, by the model's name
            config.model_init_kwargs = {**models.load_options(plan, device), "revision": start.weights.revision}
        self.samples_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * layout.world
        self.trainer = _build(
            prepared.trainer(),
            model=model,
            args=config,
            train_dataset=rows["train"].dataset,
            eval_dataset=rows["eval"].dataset if plan.evaluates else None,
            processing_class=tokenizer,
            callbacks=[MeterCallback(setup.meter, counts_tokens_over_lives=plan.kind.rewarded), *_patience(plan)],
            **extra,
        )
        if getattr(self.trainer, "padding_free", False) and not self.sharding.name.startswith("deepspeed"):
            packing.check(self.trainer.model)
        if self.tracking.names:
            self.trainer.add_callback(NoteCallback(self.tracking))
        _check_what_is_loaded(self.trainer)
        if plan.lora is not None:
            _load_the_trained_adapter_too(self.trainer)
        self.eval_size = prepared.size.get("eval", 0)
        self.dataset_size, self.dropped = prepared.size["train"], prepared.dropped["train"]
        self.truncated = prepared.truncated["train"] + rows["train"].truncated
        if len(self.trainer.get_train_dataloader()) == 0:
            raise BadRequest(
                f"spec.training.batch_size: the {self.dataset_size} rows do not fill one batch; lower it, or "
                "num_generations and gradient_accumulation_steps"
            )
        self._meter = setup.meter

    def train(self) -> None:
        """Train, from the checkpoint on where there is one.

        Raises:
            RunnerError: the checkpoint does not fit, or the loss is NaN or infinite.
        """
        resume = str(self.start.resume) if self.start.resume is not None else None
        before = None if resume else self._fingerprint()
        with self.tracking.ended():
            try:
                self.trainer.train(resume_from_checkpoint=resume)
            except NothingLeft:
                self._ctx.log.info("%s is of the last step: nothing is left to train", self.start.resume)
            except (ValueError, KeyError, RuntimeError) as error:
                if resume is not None and self._meter.total == 0:  # before the first step
                    said = " ".join(str(error).split())
                    raise RunnerError(f"cannot resume from {resume}: {said:.500}") from error
                raise
        self._check_learned()
        if before is not None and self._meter.stopped is None and self._fingerprint() == before:
            self._ctx.log.warning(
                "not one weight changed in %d steps: nothing was learned; check spec.training.learning_rate, and what "
                "the loss reads of the data", self._meter.step,
            )  # fmt: skip

    def _fingerprint(self) -> list[float] | None:
        """A sum of each trained weight; None where the ranks share the weights between them."""
        if self.sharding.name not in ("none", "ddp"):
            return None
        weights = [weight for weight in self.trainer.model.parameters() if weight.requires_grad]
        if any(weight.device.type == "meta" or not weight.is_floating_point() for weight in weights):
            return None
        return [float(weight.detach().sum(dtype=torch.float64)) for weight in weights]

    def _check_learned(self) -> None:
        """Warn where no step had rewards to compare: the advantages of equal rewards are zero."""
        logged = [
            entry["frac_reward_zero_std"]
            for entry in self.trainer.state.log_history
            if "loss" in entry and "frac_reward_zero_std" in entry
        ]
        if logged and min(logged) == 1.0:
            self._ctx.log.warning(
                "nothing was learned from the rewards: in every step all completions of a prompt had the same one; "
                "check spec.reward, or raise spec.generation.temperature or num_generations"
            )

    @property
    def best_step(self) -> int | None:
        loaded = self.trainer.args.load_best_model_at_end
        return self.trainer.state.best_global_step if loaded else None

    def save(self) -> None:
        saving.save_trainer(self.trainer, self._plan, self._ctx)

    def describe(self) -> dict[str, Any]:
        """Metrics of this kind of job."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {
            "epochs": self.trainer.state.epoch,
            **({"best_step": self.best_step} if self.best_step is not None else {}),
            "sharding": self.sharding.name,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        }


def _patience(plan: Plan) -> list[Any]:
    assert isinstance(plan.training, EvaluatedTraining)
    given = plan.training.patience if plan.evaluates else None
    return [] if given is None else [EarlyStoppingCallback(given.patience, given.threshold)]


def _check_what_is_loaded(trainer: Any) -> None:
    """Refuse a checkpoint that does not hold the model's weights. Transformers warns, and trains what is missing from
    where it stands."""

    def check(found: Any) -> None:
        weights = trainer.model.state_dict()
        known = {weights[name].data_ptr() for name in weights.keys() - {*found.missing_keys}}  # tied ones are one
        missing = [name for name in found.missing_keys if weights[name].data_ptr() not in known]
        for what, names in (("lacks", missing), ("has unknown weights, such as", found.unexpected_keys)):
            if names:
                raise BadRequest(
                    f"spec.training.resume_from_path: the checkpoint {what} {names[0]!r} ({len(names)} weights), so it "
                    f"is not of a {type(trainer.model).__name__} of this size; name the model and the task type that "
                    "wrote it"
                )
        trainer.model.tie_weights()

    trainer._issue_warnings_after_load = check


def _load_the_trained_adapter_too(trainer: Any) -> None:
    """Where TRL compares with a second adapter, it stands in a folder of its own in each checkpoint. Transformers then
    loads what such folders hold, and leaves the trained adapter beside them as it was when the run began."""
    load = trainer._load_from_checkpoint

    def load_all(path: str, model: Any = None) -> None:
        load(path, model)
        if Path(path, saving.REFERENCE, "adapter_config.json").is_file():
            loaded = trainer.model if model is None else model
            loaded.load_adapter(path, "default", is_trainable=True)
            loaded.set_adapter("default")

    trainer._load_from_checkpoint = load_all


def _build(trainer: Any, **arguments: Any) -> Any:
    """Build the trainer. What it refuses is a BadRequest."""
    try:
        return trainer(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise BadRequest(f"{trainer.__name__}: {' '.join(str(error).split()):.500}") from error
    except ImportError as error:
        raise MissingDependency.of(error, trainer.__name__) from error
