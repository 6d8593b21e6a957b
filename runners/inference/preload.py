"""Modules that an environment's fork server imports, so that a forked task starts without imports.

Importing them must start no native thread and no CUDA context. The server sets `processes.environ.SERVER` first:
otherwise OpenBLAS and pyarrow start threads, and vLLM chooses its process layout at import.
"""

TRANSFORMERS: tuple[str, ...] = (
    "torch",
    "torch._dynamo",
    "transformers",
    "transformers.generation.utils",
    "transformers.generation.continuous_batching",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.integrations.peft",
    "transformers.safetensors_conversion",
    "accelerate",
    "peft",
    "jinja2",
    "runners.inference.runner",
    "runners.inference.loader",
    "runners.inference.warm",
)
"""For Transformers: 3 s of imports; a tiny task then takes 0.08 s in its child."""

VLLM: tuple[str, ...] = (
    *TRANSFORMERS,
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.llama",
    "runners.inference.vllm_engine",
    "runners.inference.warm_vllm",
)
"""For vLLM."""
