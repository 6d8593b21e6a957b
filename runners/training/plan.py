"""Reads a training task: every section checked, before anything heavy is imported or any rank is forked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, TypeVar

from flowmesh.validation.convert import FieldError, convert
from runners.api import BadRequest, Context
from runners.data.shard import Shard
from runners.models.spec import Checkpoint, CheckpointLoad
from runners.training import settings, sources
from runners.training.kinds import KINDS, Kind

T = TypeVar("T")

READ = frozenset(
    {"taskType", "resources", "model", "data", "output", "training", "lora", "checkpoint", "shard", "generation"}
    | {"reward_model", "reward", "timeoutSec", "retainLogs", "env", "_upstreamResults"}
)
"""The fields of `spec` that a node or a trainer reads. What only resembles one of them is taken for a slip."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done, checked as far as it can be without the libraries."""

    kind: Kind
    model: settings.Model
    data: sources.Data
    source: str
    """inline, jsonl or dataset."""
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
    kind = KINDS[task_type]
    spec = ctx.spec
    _check_names(spec)
    training = section(spec, "training", kind.training)
    assert isinstance(training, settings.Training)
    data = section(spec, "data", kind.data)
    for each in dir(kind.training):
        if isinstance(getattr(kind.training, each), property):
            getattr(training, each)  # an alias that contradicts is told here
    if isinstance(training, settings.ShardedTraining) and training.deepspeed and training.fsdp:
        raise BadRequest("spec.training.fsdp: given besides deepspeed; give one")
    return Plan(
        kind=kind,
        model=_model(spec),
        data=data,
        source=sources.choose(data),
        training=training,
        lora=_lora(spec, kind),
        generation=_generation(spec, kind),
        rewards=_rewards(spec, kind),
        shard=_shard(spec),
        checkpoint=section(spec, "checkpoint", Checkpoint).load,
    )


def section(spec: dict[str, Any], name: str, into: type[T]) -> T:
    """`spec.<name>`; numbers and booleans may also be strings, since YAML reads 5e-7 as one."""
    return check(spec.get(name) or {}, into, f"spec.{name}")


def check(value: Any, into: type[T], where: str) -> T:
    try:
        return convert(value, into, where=where, strict=False)
    except FieldError as error:
        raise BadRequest(_with_hint(str(error), error.path)) from None


def _with_hint(message: str, path: str) -> str:
    """Where an unknown field of `training` is another type's, or one of the trainer's own, say so."""
    head, _, name = path.rpartition(".")
    if head != "spec.training" or "unknown field" not in message:
        return message
    users = [kind.task_type for kind in KINDS.values() if name in kind.training.__struct_fields__]
    if users:
        return f"{path}: unknown field here; it is one of {', '.join(users)}"
    return f"{message} The trainer's own arguments go under spec.training.trainer_args"


def _check_names(spec: dict[str, Any]) -> None:
    for name in spec:
        if name not in READ and (near := difflib.get_close_matches(name, READ, n=1, cutoff=0.8)):
            raise BadRequest(f"spec.{name}: unknown field; did you mean {near[0]!r}?")


def _model(spec: dict[str, Any]) -> settings.Model:
    model = section(spec, "model", settings.Model)
    if model.vllm is not None:
        raise BadRequest("spec.model.vllm: training does not run on vLLM; leave it out")
    if model.adapters:
        raise BadRequest("spec.model.adapters: give the adapter to go on from as spec.checkpoint.load instead")
    options = model.transformers
    if options.load_in_8bit and options.load_in_4bit:
        raise BadRequest("spec.model.transformers.load_in_4bit: given besides load_in_8bit; give one")
    return model


def _lora(spec: dict[str, Any], kind: Kind) -> settings.Lora | None:
    if kind.lora == "never" and spec.get("lora") is not None:
        raise BadRequest("spec.lora: sft trains all weights; for an adapter set spec.taskType to lora_sft")
    if kind.lora == "always" or spec.get("lora") is not None:
        lora = section(spec, "lora", settings.Lora)
        wanted = "SEQ_CLS" if kind.head == "score" else "CAUSAL_LM"
        if lora.task_type not in (None, wanted):
            raise BadRequest(f"spec.lora.task_type: {kind.task_type} trains a {wanted} model, not {lora.task_type}")
        return lora
    options = (spec.get("model") or {}).get("transformers") or {}
    for name in ("load_in_8bit", "load_in_4bit"):
        if options.get(name):
            raise BadRequest(f"spec.model.transformers.{name}: a quantised model can only be trained with spec.lora")
    return None


def _generation(spec: dict[str, Any], kind: Kind) -> settings.Generation:
    if not kind.rewarded and spec.get("generation") is not None:
        raise BadRequest(f"spec.generation: {kind.task_type} generates nothing; leave it out")
    generation = section(spec, "generation", settings.Generation)
    _ = generation.length
    if kind.trainer and kind.rewarded:
        if not generation.do_sample:
            raise BadRequest(f"spec.generation.do_sample: {kind.task_type} learns from samples; it cannot be false")
        if generation.stops:
            raise BadRequest(
                f"spec.generation.stop: {kind.task_type} stops at the end-of-text token only; leave it out"
            )
    return generation


def _rewards(spec: dict[str, Any], kind: Kind) -> tuple[settings.RewardModel | settings.RewardFunction, ...]:
    model, functions = spec.get("reward_model"), spec.get("reward")
    if not kind.rewarded:
        for name, given in (("reward_model", model), ("reward", functions)):
            if given is not None:
                raise BadRequest(f"spec.{name}: {kind.task_type} learns from no reward; leave it out")
        return ()
    if model is None and not functions:
        raise BadRequest("spec.reward_model: missing; give a reward_model, or spec.reward {function: …}")
    found: list[settings.RewardModel | settings.RewardFunction] = []
    if model is not None:
        found.append(check(model, settings.RewardModel, "spec.reward_model"))
    many = functions if isinstance(functions, list) else [functions] if functions else []
    for i, function in enumerate(many):
        where = f"spec.reward[{i}]" if isinstance(functions, list) else "spec.reward"
        found.append(
            check({"function": function} if isinstance(function, str) else function, settings.RewardFunction, where)
        )
    return tuple(found)


def _shard(spec: dict[str, Any]) -> Shard | None:
    if spec.get("shard") is None:
        return None
    shard = section(spec, "shard", Shard)
    shard.check("spec.shard")
    return shard
