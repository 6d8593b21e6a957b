"""Modules that an environment's fork server imports, so that a rag task forked from it starts at once.

As `runners.inference.preload` has it: the server sets ENVIRONMENT before it imports them, and keeps one native thread.
"""

ENVIRONMENT: dict[str, str] = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

RAG: tuple[str, ...] = (
    "faiss",
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.mpnet.modeling_mpnet",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
    "transformers.safetensors_conversion",
    "sentence_transformers",
    "runners.rag.runner",
    "runners.rag.embedder",
    "runners.rag.faiss_index",
    "runners.inference.warm",
)
"""For FAISS. Imports in 6 s; an index of a few passages is then built and asked in 0.2 s."""

QDRANT: tuple[str, ...] = (*RAG, "qdrant_client", "qdrant_client.http.models", "runners.rag.qdrant_search")
"""For a node that has qdrant-client as well."""
