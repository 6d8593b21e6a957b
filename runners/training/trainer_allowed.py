"""Arguments of trainers that a document may set by itself: those that only tune the training.

The others open files, load code by name, or send data to other machines, and need the operator's
`tasks.trainer_arguments`. An argument that is not listed counts as one of them. The same holds for the sections of a
DeepSpeed configuration.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from runners.api import BadRequest, Context

SETTING = "tasks.trainer_arguments"
PLAIN = frozenset(
    [
        "activation_offloading",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "assistant_only_loss",
        "auto_find_batch_size",
        "average_tokens_across_devices",
        "batch_eval_metrics",
        "beta",
        "bf16",
        "bf16_full_eval",
        "cache_implementation",
        "cast_lm_head_to_fp32",
        "center_rewards_coefficient",
        "chat_template_kwargs",
        "completion_only_loss",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "debug",
        "delta",
        "desirable_weight",
        "disable_dropout",
        "discopop_tau",
        "ds3_gather_for_generation",
        "entropy_coef",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "eos_token",
        "epsilon",
        "epsilon_high",
        "eval_accumulation_steps",
        "eval_delay",
        "eval_do_concat_batches",
        "eval_on_start",
        "eval_packing",
        "eval_steps",
        "eval_use_gather_object",
        "f_alpha_divergence_coef",
        "f_divergence_type",
        "fp16",
        "fp16_full_eval",
        "full_determinism",
        "generation_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "greater_is_better",
        "ignore_data_skip",
        "importance_sampling_level",
        "include_for_metrics",
        "include_num_input_tokens_seen",
        "label_names",
        "label_smoothing",
        "label_smoothing_factor",
        "ld_alpha",
        "learning_rate",
        "length_column_name",
        "liger_kernel_config",
        "log_completions",
        "log_level",
        "log_level_replica",
        "log_multimodal",
        "log_on_each_node",
        "log_unique_prompts",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "loss_type",
        "loss_weights",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "mask_truncated_completions",
        "max_completion_length",
        "max_grad_norm",
        "max_length",
        "max_steps",
        "max_tool_calling_iterations",
        "min_p",
        "multi_objective_aggregation",
        "neftune_noise_alpha",
        "normalize_advantages",
        "num_completions_to_print",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "num_train_epochs",
        "off_policy_mask_threshold",
        "optim",
        "optim_args",
        "optim_target_modules",
        "packing",
        "packing_strategy",
        "pad_to_multiple_of",
        "pad_token",
        "padding_free",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "precompute_ref_batch_size",
        "precompute_ref_log_probs",
        "prediction_loss_only",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "remove_unused_columns",
        "repetition_penalty",
        "reward_clip_range",
        "reward_weights",
        "router_aux_loss_coef",
        "run_name",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "save_on_each_node",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "scale_rewards",
        "seed",
        "shuffle_dataset",
        "skip_memory_metrics",
        "steps_per_generation",
        "sync_ref_model",
        "temperature",
        "tf32",
        "top_entropy_quantile",
        "top_k",
        "top_p",
        "torch_compile",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "train_sampling_strategy",
        "truncation_mode",
        "undesirable_weight",
        "use_adaptive_entropy",
        "use_bias_correction_kl",
        "use_cache",
        "use_liger_kernel",
        "use_transformers_continuous_batching",
        "use_transformers_paged",
        "use_vllm",
        "use_weighting",
        "vespo_k_neg",
        "vespo_k_pos",
        "vespo_lambda_neg",
        "vespo_lambda_pos",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
        "vllm_importance_sampling_cap",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_max_model_length",
        "vllm_model_impl",
        "vllm_structured_outputs_regex",
        "vllm_tensor_parallel_size",
        "warmup_steps",
        "weight_decay",
    ]
)

VALUES: dict[str, frozenset[str]] = {
    "torch_compile_backend": frozenset({"aot_eager", "cudagraphs", "eager", "inductor"}),
    "vllm_mode": frozenset({"colocate"}),
}
"""Arguments with harmless values; others name servers, or code that packages register."""

DEEPSPEED = frozenset(
    [
        "activation_checkpointing",
        "amp",
        "bf16",
        "communication_data_type",
        "data_types",
        "dump_state",
        "fp16",
        "fp32_allreduce",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "sparse_gradients",
        "steps_per_print",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
"""Sections of a DeepSpeed configuration. Not: trackers, files of profiles and data, backends of compilers."""


def check_argument(ctx: Context, name: str, value: Any, where: str) -> None:
    """Raises BadRequest for an argument that needs the operator's word and does not have it."""
    if name in PLAIN or (name in VALUES and value in (None, *VALUES[name])):
        return
    _refuse(ctx, name, f"{where}.{name}")


def check_deepspeed(ctx: Context, configuration: Mapping[str, Any], where: str) -> None:
    """As `check_argument`, for a DeepSpeed configuration; the setting lists `deepspeed_SECTION`."""
    for name in configuration:
        if name not in DEEPSPEED:
            _refuse(ctx, f"deepspeed_{name}", f"{where}.{name}")
    zero = configuration.get("zero_optimization")
    for key in _keys(zero):
        if key.endswith("_path"):
            _refuse(ctx, f"deepspeed_{key}", f"{where}.zero_optimization…{key}")


def _refuse(ctx: Context, name: str, where: str) -> None:
    if not any(fnmatch.fnmatchcase(name, each) for each in ctx.job.permits.trainer_arguments):
        raise BadRequest(
            f"{where}: may load code, open files or send data out; the node allows it only where its setting {SETTING} "
            f"lists {name!r}"
        )


def _keys(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(key) for key in value] + [key for each in value.values() for key in _keys(each)]
    return [key for each in value for key in _keys(each)] if isinstance(value, list) else []
