"""Imported by fork servers only, after `vllm`: what every engine does once in its process, done ahead of the fork.

These are imports for this machine's device, vLLM's logging, what it finds out about a model's class, and on a CPU its
search for kernels to replace. NVML reports the device; no tensor, thread or CUDA context is created.
"""

import importlib
import os
import sys
from typing import Any

from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging_if_needed
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

_ON_CPU = current_platform.is_cpu()
_WORKER = "vllm.v1.worker.cpu_worker" if _ON_CPU else "vllm.v1.worker.gpu_worker"

for _name in (
    _WORKER,
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.sample.sampler",
    "vllm.v1.pool.flash_maxsim",
    "vllm.lora.worker_manager",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.model_executor.models.module_mapping",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.structured_output",
    *(("vllm.v1.attention.backends.cpu_attn", "vllm.utils.cpu_triton_utils") if _ON_CPU else ()),
):
    importlib.import_module(_name)

# Setting the level of some 350 loggers takes 50 ms. A task with another level has them set once more.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
configure_logging_if_needed(LoggingConfig())

_inspect_elsewhere = registry._LazyRegisteredModel.inspect_model_cls


def _inspect_here(model: Any) -> Any:
    """vLLM looks at a class in another process, as its import might start CUDA, and keeps the result on disk. That
    process imports vLLM again, which takes the first task 12 s. What this server has imported did not start CUDA.
    """
    if model.module_name in sys.modules:
        return registry._ModelInfo.from_model_cls(model.load_model_cls())
    return _inspect_elsewhere(model)


registry._LazyRegisteredModel.inspect_model_cls = _inspect_here

if _ON_CPU:
    # It compares each name of each loaded module with each kernel: 0.3 s. A module that is imported later finds the
    # kernels replaced already.
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda _: None)
