"""Engine arguments of vLLM that a document may set by itself: those that only tune the computation.

The others load code by name, open files, or talk to other machines, and need the operator's `tasks.vllm_arguments`. An
argument that is not listed here counts as one of them, so those of a later vLLM stay closed until someone has looked.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from runners.api import BadRequest, Context

SETTING = "tasks.vllm_arguments"
PLAIN = frozenset(
    [
        "aggregate_engine_logging",
        "allow_deprecated_quantization",
        "all2all_backend",
        "async_scheduling",
        "attention_backend",
        "block_size",
        "cp_kv_cache_interleave_size",
        "cpu_distributed_timeout_seconds",
        "cpu_offload_gb",
        "cpu_offload_params",
        "cudagraph_capture_sizes",
        "cudagraph_metrics",
        "custom_histogram_buckets",
        "dbo_decode_token_threshold",
        "dbo_prefill_token_threshold",
        "dcp_comm_backend",
        "dcp_kv_cache_interleave_size",
        "dcp_q_replicate",
        "decode_context_parallel_size",
        "disable_cascade_attn",
        "disable_chunked_mm_input",
        "disable_custom_all_reduce",
        "disable_hybrid_kv_cache_manager",
        "disable_nccl_for_dp_synchronization",
        "disable_sliding_window",
        "distributed_timeout_seconds",
        "dp_sync_interval",
        "dtype",
        "enable_batch_sharded_sampling",
        "enable_chunked_prefill",
        "enable_cumem_allocator",
        "enable_dbo",
        "enable_ep_weight_filter",
        "enable_eplb",
        "enable_expert_parallel",
        "enable_flashinfer_autotune",
        "enable_hc_sp",
        "enable_layerwise_nvtx_tracing",
        "enable_logging_iteration_details",
        "enable_lora",
        "enable_mamba_cache_stochastic_rounding",
        "enable_mamba_shared_prefix_checkpoint",
        "enable_mfu_metrics",
        "enable_mixed_moe_lora_format",
        "enable_mm_processor_stats",
        "enable_moe_shared_loras",
        "enable_nccl_comm_suspend",
        "enable_prefix_caching",
        "enable_return_routed_experts",
        "enable_shm_tensor_arena",
        "enable_sleep_mode",
        "enable_tower_connector_lora",
        "enforce_eager",
        "expert_placement_strategy",
        "fail_on_environ_validation",
        "fully_sharded_loras",
        "gdn_prefill_backend",
        "gpu_memory_utilization",
        "ignore_patterns",
        "interleave_mm_strings",
        "jit_monitor_mode",
        "jit_monitor_verbose",
        "kda_decode_backend",
        "kda_prefill_backend",
        "kv_cache_dtype",
        "kv_cache_dtype_skip_layers",
        "kv_cache_memory_bytes",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "kv_offloading_size",
        "kv_sharing_fast_prefill",
        "language_model_only",
        "limit_mm_per_prompt",
        "linear_backend",
        "log_level",
        "logprobs_mode",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "lora_dtype",
        "lora_target_modules",
        "mamba_backend",
        "mamba_block_size",
        "mamba_cache_dtype",
        "mamba_cache_mode",
        "mamba_cache_philox_rounds",
        "mamba_ssm_cache_dtype",
        "mamba_ssu_algorithm",
        "max_cpu_loras",
        "max_cudagraph_capture_size",
        "max_logprobs",
        "max_lora_cls_labels",
        "max_lora_rank",
        "max_loras",
        "max_model_len",
        "max_num_active_seqs",
        "max_num_batched_tokens",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_num_scheduled_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "mm_device_do_normalize",
        "mm_encoder_attn_backend",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_save_margin",
        "mm_encoder_only",
        "mm_encoder_tp_mode",
        "mm_hasher_algorithm",
        "mm_ipc_gpu_memory_gb",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_processor_device",
        "mm_shm_cache_max_object_size_mb",
        "mm_tensor_ipc",
        "moe_backend",
        "num_gpu_blocks_override",
        "numa_bind",
        "numa_bind_cpus",
        "numa_bind_nodes",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_params",
        "offload_prefetch_step",
        "optimization_level",
        "override_generation_config",
        "per_request_spec_decode_metrics",
        "performance_mode",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "prefill_schedule_interval",
        "prefix_cache_retention_interval",
        "prefix_caching_hash_algo",
        "prefix_match_unit",
        "pt_load_map_location",
        "quantization",
        "reasoning_config",
        "reasoning_parser",
        "renderer_num_workers",
        "replayssm_buffer_len",
        "return_sampling_mask",
        "safetensors_load_strategy",
        "safetensors_prefetch_block_size",
        "safetensors_prefetch_num_threads",
        "scheduler_reserve_full_isl",
        "scheduling_policy",
        "shutdown_timeout",
        "skip_mm_profiling",
        "sleep_mode_offload_cudagraph",
        "sleep_preserve_parameter_names",
        "sparse_indexer_topk_backend",
        "spec_tokens",
        "specialize_active_lora",
        "stream_interval",
        "swa_bounded_replay",
        "tensor_parallel_size",
        "tokenizer_mode",
        "tokens_only",
        "trust_remote_code",
        "ubatch_size",
        "use_fp64_gumbel",
        "use_replayssm",
        "use_tqdm_on_load",
        "video_pruning_method",
        "video_pruning_rate",
        "watermark",
    ]
)
"""`trust_remote_code` has a setting of its own: see `runners.models.code`."""

VALUES: dict[str, frozenset[str]] = {
    "config_format": frozenset({"auto", "hf", "mistral"}),
    "distributed_executor_backend": frozenset({"mp", "uni"}),
    "generation_config": frozenset({"auto", "vllm"}),
    "kv_offloading_backend": frozenset({"native"}),
    "load_format": frozenset({"auto", "bitsandbytes", "dummy", "gguf", "hf", "mistral", "pt", "safetensors"}),
    "model_impl": frozenset({"auto", "transformers", "vllm"}),
    "spec_method": frozenset({"ngram"}),
}
"""Arguments with harmless values; others are names of classes, paths, or servers."""

KEYS: dict[str, frozenset[str]] = {
    "compilation_config": frozenset({
        "cudagraph_capture_sizes", "cudagraph_mode", "cudagraph_num_of_warmups", "max_cudagraph_capture_size", "mode",
    }),
    "speculative_config": frozenset({
        "method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min",
    }),
    "structured_outputs_config": frozenset({
        "backend", "disable_additional_properties", "disable_any_whitespace", "disable_fallback", "enable_in_reasoning",
        "reasoning_parser",
    }),
}  # fmt: skip
"""Mappings with harmless keys."""


def check_allowed(ctx: Context, options: Mapping[str, Any], where: str) -> None:
    """Raises BadRequest for an argument that needs the operator's word and does not have it."""
    for name, value in options.items():
        what = _needs_word(name, value)
        if what and not any(fnmatch.fnmatchcase(name, each) for each in ctx.job.permits.vllm_arguments):
            raise BadRequest(
                f"{where}.{what}: may load code, open files or talk to other machines; the node allows it only where "
                f"its setting {SETTING} lists {name!r}"
            )


def _needs_word(name: str, value: Any) -> str:
    """The argument, or the key in it, that needs the operator's word; empty: none does."""
    if name in PLAIN:
        return ""
    if name in VALUES:
        return "" if isinstance(value, str) and value in VALUES[name] else name
    if name not in KEYS:
        return name
    if not isinstance(value, Mapping):
        return "" if isinstance(value, int) else name
    if name == "speculative_config" and value.get("method") != "ngram":
        return f"{name}.method"
    return next((f"{name}.{key}" for key in value if key not in KEYS[name]), "")
