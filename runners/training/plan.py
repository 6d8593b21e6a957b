"""Reads and checks a training task before heavy libraries are imported or a rank is forked."""

from __future__ import annotations

import difflib
from collections.abc import Callable
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
"""Fields of `spec` that a node or a trainer reads. An unknown field close to one of them is refused as a typo."""


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
    kind = KINDS[task_type]
    spec = ctx.spec
    _check_names(spec)
    training = section(spec, "training", kind.training)
    assert isinstance(training, settings.Training)
    data = section(spec, "data", kind.data)
    for each in dir(kind.training):
        if isinstance(getattr(kind.training, each), property):
            getattr(training, each)  # raises on contradicting aliases
    eval_data = _evaluation(data, training, kind)
    if isinstance(training, settings.ShardedTraining) and training.deepspeed and training.fsdp:
        raise BadRequest("spec.training.fsdp: given besides deepspeed; give one")
    return Plan(
        kind=kind,
        model=_model(spec),
        data=data,
        source=sources.choose(data),
        eval_data=eval_data,
        eval_source=None if eval_data is None else _in_eval(sources.choose, eval_data),
        training=training,
        lora=_lora(spec, kind),
        generation=_generation(spec, kind),
        rewards=_rewards(spec, kind),
        shard=_shard(spec),
        checkpoint=section(spec, "checkpoint", Checkpoint).load,
    )


def _evaluation(data: sources.Data, training: settings.Training, kind: Kind) -> sources.Data | None:
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
        _refuse_evaluations(training, "spec.data has neither eval nor eval_split" if field is None else "it is off")
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
    found = check(data.eval, kind.data, "spec.data.eval")
    if found.eval is not None or found.eval_split is not None:
        raise BadRequest("spec.data.eval: its rows are all evaluated on; leave eval and eval_split in it out")
    return found


def _refuse_evaluations(training: settings.EvaluatedTraining, reason: str) -> None:
    for name in settings.EvaluatedTraining.__struct_fields__:
        if name in settings.Training.__struct_fields__ or (name == "eval_strategy" and training.eval_strategy == "no"):
            continue
        if getattr(training, name) not in (None, False):
            raise BadRequest(f"spec.training.{name}: no evaluation: {reason}; add data.eval or leave {name} out")


def _in_eval(choose: Callable[[sources.Data], str], data: sources.Data) -> str:
    try:
        return choose(data)
    except BadRequest as error:
        raise BadRequest(str(error).replace("spec.data", "spec.data.eval")) from error


def section(spec: dict[str, Any], name: str, into: type[T]) -> T:
    """`spec.<name>`; numbers and booleans may also be strings, since YAML reads 5e-7 as one."""
    return check(spec.get(name) or {}, into, f"spec.{name}")


def check(value: Any, into: type[T], where: str) -> T:
    try:
        return convert(value, into, where=where, strict=False)
    except FieldError as error:
        raise BadRequest(_with_hint(str(error), error.path)) from None


def _with_hint(message: str, path: str) -> str:
    """Extend an error about an unknown field of `training`: it may be another type's, or a trainer argument."""
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
        raise BadRequest("spec.model.adapters: give the adapter to continue as spec.checkpoint.load instead")
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
