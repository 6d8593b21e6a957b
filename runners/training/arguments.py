"""Builds the trainer's arguments from a task's settings, `training.trainer_args` last, checked by name and type."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context, MissingDependency
from runners.fields import Faults
from runners.training import settings
from runners.training.devices import Device, Layout
from runners.training.plan import Plan
from runners.training.sharding import Sharding
from runners.training.trainer_allowed import check_argument

WHERE = "spec.training.trainer_args"

OURS = {
    "output_dir": "checkpoints lie in the task's own folder",
    "use_cpu": "the node decides on the device",
    "local_rank": "the group sets it",
    "resume_from_checkpoint": "use spec.training.resume_from_path",
    "deepspeed": "use spec.training.deepspeed",
    "fsdp": "use spec.training.fsdp",
    "fsdp_config": "use spec.training.fsdp",
    "enable_jit_checkpoint": "a drain writes a checkpoint anyway",
    "push_to_hub": "results go where spec.output says",
    "model_init_kwargs": "use spec.model.transformers",
    "trust_remote_code": "use spec.model.transformers.trust_remote_code",
    "disable_tqdm": "progress goes to the node",
    "do_train": "it always trains",
    "report_to": "use spec.training.report_to",
    "do_eval": "use spec.data.eval and spec.training.eval_strategy",
    "do_predict": "a training task predicts nothing",
    "eval_strategy": "use spec.training.eval_strategy",
    "load_best_model_at_end": "use spec.training.load_best_model_at_end",
    "metric_for_best_model": "use spec.training.metric_for_best_model",
    "dataset_kwargs": "rows are prepared by the task's own fields",
    "dataset_text_field": "use spec.data.text_field",
}
"""Arguments that a task cannot set, and what to do instead."""

RENAMED = {
    "evaluation_strategy": "spec.training.eval_strategy",
    "warmup_ratio": "warmup_steps, which takes a fraction below 1",
    "max_seq_length": "spec.training.max_seq_length",
    "max_prompt_length": "spec.training.max_seq_length",
    "no_cuda": "spec.model.transformers.device_map: cpu",
    "group_by_length": "train_sampling_strategy",
    "torch_dtype": "spec.model.transformers.dtype",
    "adafactor": "optim",
    "kl_coef": "spec.training.kl_coef",
    "per_gpu_train_batch_size": "spec.training.batch_size",
}

NATIVE = {
    "batch_size": "per_device_train_batch_size",
    "per_device_train_batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
    "save_freq": "save_steps",
    "kl_coef": "beta",
    "ppo_epochs": "num_iterations",
    "steps": "max_steps",
}
"""The trainer's names of fields that the task calls differently. All others have one name."""


def build(plan: Plan, ctx: Context, layout: Layout, device: Device, sharding: Sharding) -> Any:
    """The trainer's configuration object.

    Raises:
        BadRequest: an argument is unknown, of the wrong type, set twice, or refused by the trainer.
    """
    import trl

    config = getattr(trl, plan.kind.config)
    arguments = {**common(plan, ctx, layout, device), **particular(plan), **evaluation(plan), **sharding.arguments}
    arguments |= checked(plan, ctx, config)
    _check_generations(plan, layout, arguments)
    try:
        return config(**arguments)
    except ImportError as error:
        raise MissingDependency.of(error, "spec.training") from error
    except (ValueError, TypeError) as error:
        raise BadRequest(f"spec.training: {_one_line(error)}") from error


def common(plan: Plan, ctx: Context, layout: Layout, device: Device) -> dict[str, Any]:
    """Arguments of all TRL trainers."""
    training = plan.training
    if training.bf16 and training.fp16:
        raise BadRequest("spec.training.fp16: given besides bf16; give one")
    if training.fp16 and not device.cuda:
        raise BadRequest("spec.training.fp16: needs a GPU, and this task has none; leave it out")
    bf16 = device.bf16 and not training.fp16 if training.bf16 is None else training.bf16
    find_unused = training.ddp_find_unused_parameters
    return {
        "output_dir": str(checkpoints_dir(ctx)),
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.step_limit or -1,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": plan.learning_rate,
        "warmup_steps": training.warmup_steps,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # so that a NaN loss is logged
        "save_steps": training.saves_every or plan.kind.save_steps,
        "save_strategy": training.save_strategy,
        "bf16": bf16,
        "fp16": training.fp16,
        "seed": training.seed,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if plan.gradient_checkpointing else None,
        "use_cpu": not device.cuda,
        "dataloader_pin_memory": device.cuda,
        "ddp_find_unused_parameters": (False if layout.is_group else None) if find_unused is None else find_unused,
        "report_to": list(training.trackers) or "none",
        "disable_tqdm": True,
    }


def evaluation(plan: Plan) -> dict[str, Any]:
    """Arguments for evaluation: when, and what the result is used for."""
    training = plan.training
    assert isinstance(training, settings.EvaluatedTraining)
    if not plan.evaluates:
        return {}
    strategy = training.eval_strategy or ("epoch" if training.eval_steps is None else "steps")
    found: dict[str, Any] = {
        "eval_strategy": strategy,
        "eval_steps": training.eval_steps or plan.kind.save_steps,
        "per_device_eval_batch_size": training.per_device_eval_batch_size or plan.batch_size,
    }
    if not training.compares:
        return found
    metric = training.metric_for_best_model or ("eval_reward" if plan.kind.rewarded else "eval_loss")
    greater = not metric.endswith("loss") if training.greater_is_better is None else training.greater_is_better
    found |= {"metric_for_best_model": metric, "greater_is_better": greater}
    if training.load_best_model_at_end:
        # the best weights can be loaded only if each evaluation has a checkpoint
        found |= {"load_best_model_at_end": True, "save_strategy": strategy, "save_steps": found["eval_steps"]}
    return found


def particular(plan: Plan) -> dict[str, Any]:
    """Arguments of some trainers only."""
    training = plan.training
    match training:
        case settings.SftTraining():
            return {"max_length": training.max_seq_length, "packing": training.packing}
        case settings.PreferenceTraining():
            return {"max_length": training.max_seq_length, "beta": training.beta, **_dropout(plan)}
        case settings.RewardTraining():
            return {"max_length": training.max_seq_length, **_dropout(plan)}
        case settings.OnlineTraining():
            given = {
                "beta": training.kl_weight,
                "num_generations": training.num_generations,
                "num_iterations": training.ppo_epochs,
                "temperature": plan.generation.temperature or training.temperature,
            }
            found = {name: value for name, value in given.items() if value is not None}
            return found | {"max_completion_length": completion_length(plan)}
    raise AssertionError(f"no trainer of TRL's takes {type(training).__name__}")


def _dropout(plan: Plan) -> dict[str, Any]:
    """These trainers disable all dropout, the adapter's too. Keep it where the task asks for it."""
    asked = plan.lora is not None and plan.lora.dropout is not None
    return {"disable_dropout": False} if asked else {}


DEFAULT_COMPLETION = 256


def completion_length(plan: Plan) -> int:
    """The most tokens of a completion. The prompt has the rest of max_seq_length."""
    room = plan.training.max_seq_length
    given = plan.generation.length
    if given is None:
        return min(DEFAULT_COMPLETION, max(room // 2, 1))
    if given >= room:
        raise BadRequest(
            f"spec.generation.max_new_tokens: {given} leaves no room for a prompt in training.max_seq_length {room}"
        )
    return given


def _check_generations(plan: Plan, layout: Layout, arguments: dict[str, Any]) -> None:
    """TRL generates a prompt's completions in one batch. Checked here to name the task's own fields."""
    if not isinstance(plan.training, settings.OnlineTraining):
        return
    length, whole = arguments["max_completion_length"], plan.training.max_seq_length
    if length is not None and length >= whole:
        raise BadRequest(
            f"spec.training.trainer_args.max_completion_length: {length} leaves no room for a prompt in "
            f"training.max_seq_length {whole}"
        )
    count = arguments.get("num_generations") or (8 if plan.kind.task_type == "grpo" else 2)
    per_step = arguments["per_device_train_batch_size"] * layout.world
    batch = arguments.get("generation_batch_size")
    if batch is None:
        passes = arguments.get("steps_per_generation") or arguments["gradient_accumulation_steps"]
        batch = per_step * passes
    if batch % count:
        raise BadRequest(
            f"spec.training.num_generations: {count} does not divide the {batch} completions of a step "
            f"(batch_size x ranks x gradient_accumulation_steps); change one of them"
        )


def checked(plan: Plan, ctx: Context, config: type) -> dict[str, Any]:
    """`training.trainer_args`, each a field of `config` and of its type."""
    known = {field.name for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    taken = {NATIVE.get(name, name): name for name in ctx.spec.get("training") or {}}
    faults = Faults()

    def one(name: str, value: Any) -> Any:
        if name in OURS or name.startswith("hub_"):
            raise BadRequest(f"{WHERE}.{name}: cannot be set; {OURS.get(name, OURS['push_to_hub'])}")
        if name not in known:
            hint = f"use {RENAMED[name]}" if name in RENAMED else nearest(name, sorted(known - OURS.keys()))
            raise BadRequest(f"{WHERE}.{name}: {config.__name__} has no such argument; {hint}")
        if name in taken:
            raise BadRequest(f"{WHERE}.{name}: spec.training.{taken[name]} sets it already; give one of them")
        if name == "use_vllm" and value and not ctx.gpus:
            raise BadRequest(f"{WHERE}.use_vllm: vLLM can take new weights on a GPU only; leave it out")
        check_argument(ctx, name, value, WHERE)
        return typed(value, hints[name], f"{WHERE}.{name}")

    given = plan.training.trainer_args
    found = {name: faults.read(lambda name=name, value=value: one(name, value)) for name, value in given.items()}  # type: ignore[misc]
    faults.check()
    return found


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` converted to `hint`. Types that msgspec does not know are left to the trainer."""
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{where}: {_one_line(error)} (found {value!r:.80})") from None
    except TypeError:
        return value


def checkpoints_dir(ctx: Context) -> Path:
    return ctx.out_dir / "checkpoints"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
