"""Sections of a training task as structs: `training`, `lora`, `generation`, `reward_model`, `reward`, `model`.

Every field of docs/tasks.md is here and has a reader elsewhere. A field that is not here is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from runners.api import BadRequest

Count = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


class Training(Section, frozen=True):
    """Fields of `spec.training` for all trainers."""

    num_train_epochs: Positive = 1.0
    max_steps: int | None = None
    """Optimizer steps; overrides the epochs. -1: no limit, as in the libraries."""
    batch_size: Count | None = None
    """Rows for each rank and step."""
    per_device_train_batch_size: Count | None = None
    """Alias of batch_size."""
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive | None = None
    warmup_steps: NotNegative = 0
    """Below 1: a fraction of all steps."""
    logging_steps: Count = 10
    save_steps: Count | None = None
    save_freq: Count | None = None
    """Alias of save_steps."""
    save_on_time_s: Positive | None = None
    """Also write a checkpoint at the first step that ends so many seconds after the last one."""
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    save_model: bool = True
    bf16: bool | None = None
    """None: where the GPU can."""
    fp16: bool = False
    max_seq_length: Count = 1024
    gradient_checkpointing: bool | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 42
    ddp_find_unused_parameters: bool | None = None
    resume_from_path: str | None = None
    report_to: Tracker | list[Tracker] | None = None
    """Experiment trackers."""

    allow_multi_gpu: bool = True
    nproc_per_node: Count | None = None
    visible_devices: str | list[int | str] | None = None
    """Which of the task's GPUs: indices into them, or UUIDs."""
    primary_gpu: Annotated[int, Meta(ge=0)] | None = None
    """The GPU of rank 0 (or of the only process): an index into visible_devices."""
    nnodes: Count = 1
    node_rank: Annotated[int, Meta(ge=0)] | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str = "flowmesh"

    trainer_args: dict[str, Any] = {}
    """The trainer's own arguments."""

    @property
    def trackers(self) -> tuple[str, ...]:
        given = self.report_to if isinstance(self.report_to, list) else [self.report_to]
        return tuple(dict.fromkeys(name for name in given if name not in (None, "none")))

    @property
    def device_batch(self) -> int | None:
        return either(self.batch_size, self.per_device_train_batch_size, "batch_size", "per_device_train_batch_size")

    @property
    def saves_every(self) -> int | None:
        return either(self.save_steps, self.save_freq, "save_steps", "save_freq")

    @property
    def step_limit(self) -> int | None:
        if self.max_steps is None or self.max_steps == -1:
            return None
        if self.max_steps < 1:
            raise BadRequest(
                f"spec.training.max_steps: {self.max_steps} steps train nothing; give 1 or more, or leave it out"
            )
        return self.max_steps


class EarlyStopping(Section, frozen=True):
    """`training.early_stopping`: end the run when the metric stops improving."""

    patience: Count = 3
    """Evaluations in a row."""
    threshold: NotNegative = 0.0
    """Smallest improvement that counts."""


class EvaluatedTraining(Training, frozen=True):
    """Trainers that can evaluate on held-out rows: see `data.eval`."""

    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """None: with data to evaluate on, steps where eval_steps is given, else epoch."""
    eval_steps: Count | None = None
    per_device_eval_batch_size: Count | None = None
    """None: as in training."""
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    """None: eval_loss; eval_reward where completions are rewarded."""
    greater_is_better: bool | None = None
    early_stopping: EarlyStopping | bool | None = None

    @property
    def patience(self) -> EarlyStopping | None:
        if isinstance(self.early_stopping, EarlyStopping):
            return self.early_stopping
        return EarlyStopping() if self.early_stopping else None

    @property
    def compares(self) -> bool:
        """Whether evaluations are compared."""
        return self.load_best_model_at_end or self.patience is not None


class ShardedTraining(EvaluatedTraining, frozen=True):
    """Trainers that can shard a model's state over the ranks."""

    deepspeed: dict[str, Any] | str | None = None
    """A DeepSpeed configuration, or the path of one."""
    auto_deepspeed: bool = True
    auto_deepspeed_stage: Annotated[int, Meta(ge=1, le=3)] | None = None
    zero_stage: Annotated[int, Meta(ge=1, le=3)] | None = None
    """Alias of auto_deepspeed_stage."""
    fsdp: bool | str | dict[str, Any] | None = None

    @property
    def stage(self) -> int | None:
        return either(self.auto_deepspeed_stage, self.zero_stage, "auto_deepspeed_stage", "zero_stage")


class SftTraining(ShardedTraining, frozen=True):
    packing: bool = False


class PreferenceTraining(ShardedTraining, frozen=True):
    """dpo, kto"""

    beta: Positive = 0.1


class RewardTraining(ShardedTraining, frozen=True):
    """reward"""


class OnlineTraining(ShardedTraining, frozen=True):
    """grpo, rloo"""

    num_generations: Annotated[int, Meta(ge=2)] | None = None
    beta: NotNegative | None = None
    kl_coef: NotNegative | None = None
    """Alias of beta."""
    ppo_epochs: Count | None = None
    """Passes over each batch of completions (num_iterations in TRL)."""
    steps: Count | None = None
    """Alias of max_steps."""
    temperature: Positive | None = None

    @property
    def kl_weight(self) -> float | None:
        return either(self.beta, self.kl_coef, "beta", "kl_coef")

    @property
    def step_limit(self) -> int | None:
        return either(super().step_limit, self.steps, "max_steps", "steps")


class PpoTraining(Training, frozen=True):
    mini_batch_size: Count | None = None
    """Completions for each optimizer step and rank."""
    num_mini_batches: Count | None = None
    ppo_epochs: Count = 4
    steps: Count | None = None
    """Updates: batches of completions. Alias of max_steps."""
    kl_coef: NotNegative = 0.2
    target_kl: Positive | None = None
    """End an update's passes early when the divergence from the old policy exceeds 1.5 times this."""
    temperature: Positive | None = None

    @property
    def device_batch(self) -> int | None:
        return self.batch_size  # here per_device_train_batch_size is another number: see ppo_batches

    @property
    def step_limit(self) -> int | None:
        return either(super().step_limit, self.steps, "max_steps", "steps")


class PpoArgs(Section, frozen=True):
    """`training.trainer_args` of ppo."""

    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: Positive = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: NotNegative = 0.1
    entropy_coef: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    weight_decay: NotNegative = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Positive = 1e-8
    lr_scheduler_type: str = "constant"
    whiten_rewards: bool = False
    reward_clip: Positive | None = None
    save_total_limit: Count | None = None
    ddp_timeout: Count = 1800


class Lora(Section, frozen=True):
    """`spec.lora`"""

    r: Count = 16
    alpha: Positive = 32
    dropout: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """None: 0.05, but 0 for ppo, which compares two passes of one model."""
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] | None = None
    use_rslora: bool = False


class Generation(Section, frozen=True):
    """`spec.generation`"""

    max_new_tokens: Count | None = None
    max_tokens: Count | None = None
    """Alias of max_new_tokens."""
    temperature: Positive | None = None
    do_sample: bool = True
    stop: str | list[str] | None = None

    @property
    def length(self) -> int | None:
        return either(self.max_new_tokens, self.max_tokens, "max_new_tokens", "max_tokens", "generation")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class RewardModel(Section, frozen=True):
    """`spec.reward_model`"""

    identifier: str
    revision: str | None = None
    type: Literal["classification", "sentiment"] = "classification"
    positive_label: str | None = None
    negative_label: str | None = None
    scale: float = 1.0
    max_length: Count = 512


class RewardFunction(Section, frozen=True):
    """`spec.reward`, or one of them in a list"""

    function: str
    """length | regex | exact_match | json_valid | module:callable"""
    weight: float = 1.0
    pattern: str | None = None
    """regex: pattern to find in a completion."""
    target: Count | None = None
    """length: number of characters for a reward of 1."""
    column: str | None = None
    """exact_match: the column of the data that holds the answer."""


class ModelSource(Section, frozen=True):
    identifier: str
    type: Literal["huggingface"] = "huggingface"
    revision: str | None = None
    trust_remote_code: bool | None = None


class TransformersModel(Section, frozen=True):
    """`spec.model.transformers`"""

    device_map: Literal["auto", "balanced", "cuda", "cpu"] | None = None
    dtype: str | None = None
    trust_remote_code: bool | None = None
    """None: as model.source says."""
    low_cpu_mem_usage: bool | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    use_flash_attention_2: bool = False
    attn_implementation: str | None = None


class Model(Section, frozen=True):
    """`spec.model`"""

    source: ModelSource | None = None
    transformers: TransformersModel = TransformersModel()
    adapters: list[Any] | None = None


class Jsonl(Section, frozen=True):
    """Where a JSONL file is. The first of download_url, url, path, worker_path that can be read."""

    path: str | None = None
    url: str | None = None
    download_url: str | None = None
    worker_path: str | None = None
    headers: dict[str, str] = {}
    timeout_s: Positive | None = field(default=None, name="timeoutSec")


def either(first: Any, second: Any, first_name: str, second_name: str, section: str = "training") -> Any:
    """The value of a field or its alias.

    Raises:
        BadRequest: both are set and differ.
    """
    if first is not None and second is not None and first != second:
        raise BadRequest(
            f"spec.{section}.{second_name}: {second!r} contradicts {first_name} {first!r}; they are one, give one"
        )
    return second if first is None else first
