"""Imported by fork servers only, after `vllm`: the modules that an engine imports on this machine's device.

NVML reports the device; no tensor and no CUDA context is created.
"""

import importlib

from vllm.platforms import current_platform

_WORKER = "vllm.v1.worker.cpu_worker" if current_platform.is_cpu() else "vllm.v1.worker.gpu_worker"

for _name in (
    _WORKER,
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.sample.sampler",
    "vllm.lora.worker_manager",
    "vllm.model_executor.models.module_mapping",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.structured_output",
    *(("vllm.v1.attention.backends.cpu_attn",) if current_platform.is_cpu() else ()),
):
    importlib.import_module(_name)
