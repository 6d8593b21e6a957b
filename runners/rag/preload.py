"""Modules that an environment's fork server imports, so that a rag task forked from it starts at once.

Importing them starts no native thread; see `runners.inference.preload`.
"""

import importlib.util


def if_installed(library: str, *modules: str) -> tuple[str, ...]:
    """`modules` if the library is installed, else none of them."""
    return modules if importlib.util.find_spec(library) is not None else ()


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
    "runners.embedding.load",
    "runners.rag.faiss_search",
    "runners.rag.generate",
    "runners.inference.warm",
    *if_installed("qdrant_client", "qdrant_client", "qdrant_client.http.models", "runners.rag.qdrant_search"),
)
"""For FAISS, and for Qdrant where its client is installed. Imports in 6 s."""
