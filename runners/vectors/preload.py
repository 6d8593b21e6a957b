"""Modules that an environment's fork server imports for the task types `embedding` and `score`.

Importing them starts no native thread; see `runners.inference.preload`.
"""

_LIBRARIES: tuple[str, ...] = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "sentence_transformers",
)
VECTORS: tuple[str, ...] = (*_LIBRARIES, "runners.vectors.runner", "runners.embedding.load")
SCORE: tuple[str, ...] = (*_LIBRARIES, "runners.scoring.runner", "runners.scoring.scorer")
