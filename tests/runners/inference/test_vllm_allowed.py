"""Engine arguments of vLLM: each is classified, and those that load code or open files need the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runners.api import BadRequest, Context
from runners.inference.vllm_allowed import KEYS, PLAIN, VALUES, check_allowed
from runners.inference.vllm_args import OWNED, check_folder
from tests.kit.paths import PERMITS

MakeContext = Callable[..., Context]
CLOSED: dict[str, Any] = {
    "reasoning_parser_plugin": "/srv/x.py", "io_processor_plugin": "x", "worker_cls": "evil.Worker",
    "worker_extension_cls": "evil.Worker", "scheduler_cls": "evil.Scheduler", "logits_processors": ["evil:Processor"],
    "kv_transfer_config": {"kv_connector_module_path": "evil"}, "kv_events_config": {}, "ec_transfer_config": {},
    "allowed_local_media_path": "/", "allowed_media_domains": ["x"], "hf_overrides": {"auto_map": {}},
    "model_loader_extra_config": {}, "additional_config": {}, "model_class_overrides": {"A": "evil:B"},
    "model_weights": "/srv", "code_revision": "x", "hf_token": "x", "default_mm_loras": {"image": "/srv"},
    "mm_encoder_fp8_scale_path": "/srv", "mm_encoder_fp8_scale_save_path": "/srv", "log_config_file": "/srv",
    "otlp_traces_endpoint": "http://h", "profiler_config": {"torch_profiler_dir": "/srv"}, "master_addr": "h",
    "data_parallel_address": "h", "device_ids": [0], "weight_transfer_config": {},
    "distributed_executor_backend": "ray",
    "load_format": "tensorizer", "generation_config": "/srv", "kv_offloading_backend": "lmcache",
    "model_impl": "terratorch", "spec_model": "/srv", "spec_method": "draft_model", "config_format": "evil",
}  # fmt: skip
INSIDE: list[tuple[str, dict[str, Any]]] = [
    ("compilation_config", {"backend": "evil.backend"}),
    ("compilation_config", {"inductor_passes": {"p": "evil.f"}}),
    ("compilation_config", {"cache_dir": "/srv"}),
    ("structured_outputs_config", {"reasoning_parser_plugin": "/srv/x.py"}),
    ("speculative_config", {"method": "eagle", "model": "/srv"}),
    ("speculative_config", {"method": "ngram", "model": "/srv"}),
]


def test_each_argument_of_the_installed_vllm_is_classified() -> None:
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    looked_at = {
        "aux_output_config", "collect_detailed_traces", "diffusion_config", "attention_config",
        "ec_manager_config", "elastic_ep_max_dp_size", "enable_elastic_ep", "enable_fault_tolerance", "engram_config",
        "enable_mm_embeds", "enable_prompt_embeds", "enable_trace_replay", "eplb_config", "fault_tolerance_config",
        "ir_op_priority", "kernel_config", "logging_config", "mamba_config", "master_port", "media_io_kwargs",
        "mm_processor_kwargs", "nnodes", "node_rank", "pooler_config", "quantization_config",
        "ray_workers_use_nsight", "show_hidden_metrics_for_version", "watermark_config",
    }  # fmt: skip
    rest = known - PLAIN - VALUES.keys() - KEYS.keys() - OWNED.keys() - CLOSED.keys() - looked_at - {"download_dir"}
    assert {name for name in rest if not name.startswith(("_api_process_", "data_parallel_"))} == set()
    assert not PLAIN & CLOSED.keys()


@pytest.mark.parametrize(("name", "value"), [*CLOSED.items(), *INSIDE, ("of_a_later_version", 1)])
def test_a_closed_argument_needs_the_operator(make_context: MakeContext, name: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=rf"spec\.model\.vllm\.{name}.*tasks\.vllm_arguments"):
        check_allowed(make_context({}), {name: value}, "spec.model.vllm")
    permits = msgspec.structs.replace(PERMITS, vllm_arguments=(name,))
    check_allowed(make_context({}, permits=permits), {name: value}, "spec.model.vllm")


def test_plain_arguments_pass(make_context: MakeContext) -> None:
    plain = {
        "max_model_len": 9, "enforce_eager": True, "load_format": "safetensors", "compilation_config": 3,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}, "trust_remote_code": True,
        "structured_outputs_config": {"backend": "guidance"}, "distributed_executor_backend": "mp",
    }  # fmt: skip
    check_allowed(make_context({}), plain, "spec.model.vllm")


def test_the_download_dir_lies_where_the_task_may_write(make_context: MakeContext, tmp_path: Path) -> None:
    ctx = make_context({})
    check_folder(ctx, {"download_dir": str(ctx.out_dir / "hub")})
    (ctx.out_dir / "link").symlink_to(tmp_path)
    for folder in ("/srv/models", str(ctx.out_dir / "link"), str(ctx.results_dir / "other"), 5):
        with pytest.raises(BadRequest, match="download_dir"):
            check_folder(ctx, {"download_dir": folder})
    check_folder(
        make_context({}, permits=msgspec.structs.replace(PERMITS, vllm_arguments=("download_dir",))),
        {"download_dir": "/srv/models"},
    )
