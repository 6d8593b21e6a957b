"""Reads and checks a training task before heavy libraries are imported or a rank is forked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import msgspec

from flowmesh.validation.convert import joined
from flowmesh.validation.unused import is_unused
from runners.api import BadRequest, Context
from runners.data.shard import Shard
from runners.fields import Faults, check_spec
from runners.models.spec import Checkpoint, CheckpointLoad
from runners.training import settings, sources
from runners.training.kinds import KINDS, Kind
from runners.training.meeting import with_gang

T = TypeVar("T")

OWN_FIELDS = ("model", "data", "training", "lora", "checkpoint")
"""Fields of `spec` of all training types."""
REWARDED_FIELDS = ("generation", "reward_model", "reward")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A task, checked as far as possible without the libraries."""

    kind: Kind
    model: settings.Model
    data: sources.Data
    source: str
    """inline, jsonl or dataset."""
    eval_data: sources.Data | None = None
    """`data.eval`"""
    eval_source: str | None = None
    training: settings.Training
    lora: settings.Lora | None
    generation: settings.Generation
    rewards: tuple[settings.RewardModel | settings.RewardFunction, ...]
    shard: Shard | None
    checkpoint: CheckpointLoad | None

    @property
    def folder(self) -> str:
        return self.kind.folder(lora=self.lora is not None)

    @property
    def evaluates(self) -> bool:
        asked = self.data.eval is not None or self.data.eval_split is not None
        return asked and getattr(self.training, "eval_strategy", None) != "no"

    @property
    def batch_size(self) -> int:
        return self.training.device_batch or self.kind.batch_size

    @property
    def learning_rate(self) -> float:
        default = self.kind.learning_rate if self.lora is None else self.kind.lora_learning_rate
        return self.training.learning_rate or default

    @property
    def gradient_checkpointing(self) -> bool:
        given = self.training.gradient_checkpointing
        return self.kind.gradient_checkpointing if given is None else given


def read(task_type: str, ctx: Context) -> Plan:
    """The task of `ctx` as a plan.

    Raises:
        BadRequest: naming the field, what was found and what is allowed.
    """
    kind, spec = KINDS[task_type], ctx.spec
    faults = Faults()
    own = (*OWN_FIELDS, *REWARDED_FIELDS) if kind.rewarded else OWN_FIELDS
    options: dict[str, type[Any]] = {"training": kind.training, "lora": settings.Lora}
    faults.read(lambda: check_spec(ctx, spec, "spec", own, options))
    training = faults.read(lambda: _training(ctx, kind))
    data = faults.read(lambda: section(ctx, "data", kind.data))
    source = None if data is None else faults.read(lambda: sources.choose(data))
    eval_data = eval_source = None
    if training is not None and data is not None:
        eval_data = faults.read(lambda: _evaluation(ctx, data, training, kind))
    if eval_data is not None:
        eval_source = faults.read(lambda: _in_eval(sources.choose, eval_data))
    model = faults.read(lambda: _model(ctx))
    lora = faults.read(lambda: _lora(ctx, kind))
    generation = faults.read(lambda: _generation(ctx, kind))
    rewards = faults.read(lambda: _rewards(ctx, kind))
    shard = faults.read(lambda: _shard(ctx))
    checkpoint = faults.read(lambda: section(ctx, "checkpoint", Checkpoint))
    faults.check()
    if not (training and data and source and model and generation and checkpoint):
        raise AssertionError("a part that is missing was a fault")
    return Plan(
        kind=kind,
        model=model,
        data=data,
        source=source,
        eval_data=eval_data,
        eval_source=eval_source,
        training=training,
        lora=lora,
        generation=generation,
        rewards=rewards or (),
        shard=shard,
        checkpoint=checkpoint.load,
    )


def _training(ctx: Context, kind: Kind) -> settings.Training:
    training = section(ctx, "training", kind.training)
    assert isinstance(training, settings.Training)
    faults = Faults()
    for each in dir(kind.training):
        if isinstance(getattr(kind.training, each), property):
            faults.read(lambda each=each: getattr(training, each))  # type: ignore[misc]  # raises on contradicting aliases
    if isinstance(training, settings.ShardedTraining) and training.deepspeed and training.fsdp:
        faults.read(lambda: _refuse("spec.training.fsdp: given besides deepspeed; give one"))
    if isinstance(training, settings.PpoTraining):
        faults.read(lambda: check(ctx, training.trainer_args, settings.PpoArgs, "spec.training.trainer_args"))
    found = faults.read(lambda: with_gang(training, ctx))
    faults.check()
    assert found is not None, "else it was a fault"
    return found


def _refuse(message: str) -> NoReturn:
    raise BadRequest(message)


def _evaluation(ctx: Context, data: sources.Data, training: settings.Training, kind: Kind) -> sources.Data | None:
    """Check the fields for evaluation; returns `data.eval` where there is one.

    Raises:
        BadRequest: they contradict each other, or this task type has no evaluation.
    """
    field = "eval" if data.eval is not None else "eval_split" if data.eval_split is not None else None
    if not isinstance(training, settings.EvaluatedTraining):
        if field is not None:
            raise BadRequest(f"spec.data.{field}: {kind.task_type} evaluates nothing; leave it out")
        return None
    if data.eval is not None and data.eval_split is not None:
        raise BadRequest("spec.data.eval_split: given besides spec.data.eval; give one")
    if isinstance(data.eval_split, str) and data.dataset_name is None:
        raise BadRequest(
            f"spec.data.eval_split: {data.eval_split!r} is a split of a dataset, and there is no dataset_name; give a "
            "share of the rows between 0 and 1"
        )
    if isinstance(data.eval_split, float) and not 0 < data.eval_split < 1:
        raise BadRequest(f"spec.data.eval_split: a share between 0 and 1 is needed, found {data.eval_split}")
    if field is None or training.eval_strategy == "no":
        _refuse_evaluations(
            ctx, training, "spec.data has neither eval nor eval_split" if field is None else "it is off"
        )
    if training.eval_strategy == "epoch" and training.eval_steps is not None:
        raise BadRequest("spec.training.eval_steps: given besides eval_strategy epoch; give one")
    if training.load_best_model_at_end and training.save_strategy == "no":
        raise BadRequest("spec.training.load_best_model_at_end: needs checkpoints; leave save_strategy no out")
    if training.load_best_model_at_end and training.saves_every not in (None, training.eval_steps):
        raise BadRequest(
            "spec.training.save_steps: load_best_model_at_end writes a checkpoint at each evaluation; leave save_steps "
            "out, or set it to eval_steps"
        )
    if data.eval is None:
        return None
    found = check(ctx, data.eval, kind.data, "spec.data.eval")
    if found.eval is not None or found.eval_split is not None:
        raise BadRequest("spec.data.eval: its rows are all evaluated on; leave eval and eval_split in it out")
    return found


def _refuse_evaluations(ctx: Context, training: settings.EvaluatedTraining, reason: str) -> None:
    for name in settings.EvaluatedTraining.__struct_fields__:
        if name in settings.Training.__struct_fields__ or (name == "eval_strategy" and training.eval_strategy == "no"):
            continue
        value = getattr(training, name)
        if name == "early_stopping" and is_unused("training", name, value):
            if value is not None:
                ctx.unused.append(f"spec.training.{name}")
        elif value not in (None, False):
            raise BadRequest(f"spec.training.{name}: no evaluation: {reason}; add data.eval or leave {name} out")


def _in_eval(choose: Callable[[sources.Data], str], data: sources.Data) -> str:
    try:
        return choose(data)
    except BadRequest as error:
        raise BadRequest(str(error).replace("spec.data", "spec.data.eval")) from error


def section(ctx: Context, name: str, into: type[T]) -> T:
    """`spec.<name>`; numbers and booleans may also be strings, since YAML reads 5e-7 as one."""
    return check(ctx, ctx.spec.get(name) or {}, into, f"spec.{name}")


def check(ctx: Context, value: Any, into: type[T], where: str) -> T:
    try:
        return ctx.check(value, into, where, strict=False)
    except BadRequest as error:
        faults = [_with_hint(fault) for fault in error.faults]
        raise BadRequest(joined(faults), tuple(faults)) from None


def _with_hint(message: str) -> str:
    """Extend an error about an unknown field of `training`: it may be another type's, or a trainer argument."""
    path = message.partition(": ")[0]
    head, _, name = path.rpartition(".")
    if head != "spec.training" or "unknown field" not in message:
        return message
    users = [kind.task_type for kind in KINDS.values() if name in kind.training.__struct_fields__]
    if users:
        return f"{path}: unknown field here; it is one of {', '.join(users)}"
    return f"{message} The trainer's own arguments go under spec.training.trainer_args"


def _model(ctx: Context) -> settings.Model:
    model = section(ctx, "model", settings.Model)
    if model.adapters:
        raise BadRequest("spec.model.adapters: give the adapter to continue as spec.checkpoint.load instead")
    options = model.transformers
    if options.load_in_8bit and options.load_in_4bit:
        raise BadRequest("spec.model.transformers.load_in_4bit: given besides load_in_8bit; give one")
    trust = options.trust_remote_code
    if trust is None and model.source is not None:
        trust = model.source.trust_remote_code
    return msgspec.structs.replace(model, transformers=msgspec.structs.replace(options, trust_remote_code=bool(trust)))


def _lora(ctx: Context, kind: Kind) -> settings.Lora | None:
    spec = ctx.spec
    if kind.lora == "never" and spec.get("lora") is not None:
        raise BadRequest("spec.lora: sft trains all weights; for an adapter set spec.taskType to lora_sft")
    if kind.lora == "always" or spec.get("lora") is not None:
        lora = section(ctx, "lora", settings.Lora)
        wanted = "SEQ_CLS" if kind.head == "score" else "CAUSAL_LM"
        if lora.task_type not in (None, wanted):
            raise BadRequest(f"spec.lora.task_type: {kind.task_type} trains a {wanted} model, not {lora.task_type}")
        return lora
    model = spec.get("model")
    options = model.get("transformers") if isinstance(model, dict) else None
    for name in ("load_in_8bit", "load_in_4bit"):
        if isinstance(options, dict) and options.get(name):
            raise BadRequest(f"spec.model.transformers.{name}: a quantised model can only be trained with spec.lora")
    return None


def _generation(ctx: Context, kind: Kind) -> settings.Generation:
    if not kind.rewarded:
        return settings.Generation()
    generation = section(ctx, "generation", settings.Generation)
    _ = generation.length
    if kind.trainer and kind.rewarded:
        if not generation.do_sample:
            raise BadRequest(f"spec.generation.do_sample: {kind.task_type} learns from samples; it cannot be false")
        if generation.stops:
            raise BadRequest(
                f"spec.generation.stop: {kind.task_type} stops at the end-of-text token only; leave it out"
            )
    return generation


def _rewards(ctx: Context, kind: Kind) -> tuple[settings.RewardModel | settings.RewardFunction, ...]:
    if not kind.rewarded:
        return ()
    model, functions = ctx.spec.get("reward_model"), ctx.spec.get("reward")
    if model is None and not functions:
        raise BadRequest("spec.reward_model: missing; give a reward_model, or spec.reward {function: …}")
    found: list[settings.RewardModel | settings.RewardFunction] = []
    if model is not None:
        found.append(check(ctx, model, settings.RewardModel, "spec.reward_model"))
    many = functions if isinstance(functions, list) else [functions] if functions else []
    for i, function in enumerate(many):
        where = f"spec.reward[{i}]" if isinstance(functions, list) else "spec.reward"
        found.append(
            check(
                ctx, {"function": function} if isinstance(function, str) else function, settings.RewardFunction, where
            )
        )
    factors = [each.scale if isinstance(each, settings.RewardModel) else each.weight for each in found]
    if not any(factors):
        field = "spec.reward_model.scale" if model is not None else "spec.reward.weight"
        raise BadRequest(f"{field}: 0, so that every completion gets the same reward; give a number other than 0")
    return tuple(found)


def _shard(ctx: Context) -> Shard | None:
    if ctx.spec.get("shard") is None:
        return None
    shard = section(ctx, "shard", Shard)
    shard.check("spec.shard")
    return shard
