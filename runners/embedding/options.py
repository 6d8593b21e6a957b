"""`spec.embedding`: the model that turns texts into vectors, and how. Of `rag`, and of the task type `embedding`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from runners.models.spec import Section

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


class ModelOptions(Section, frozen=True):
    """Which embedding model, and where it runs."""

    model: Annotated[str, Meta(min_length=1)] | None = None
    """A hub id, a local folder, or the URL of an archive, that sentence-transformers can load."""
    revision: str | None = None
    device: Device | None = None
    batch_tokens: Annotated[int, Meta(ge=16)] | None = None
    """Tokens, including padding, in one batch."""
    trust_remote_code: bool | None = None


class Embedding(ModelOptions, frozen=True):
    """spec.embedding of `rag`"""

    query_prompt: str | None = None
    """Prefix of each query; default: that of the model's files."""
    document_prompt: str | None = None


class EmbeddingOptions(ModelOptions, frozen=True):
    """spec.embedding of `embedding`; names are those of sentence-transformers' `encode` where it has them"""

    prompt: str | None = None
    """Put before each text; default: the model's own default prompt."""
    prompt_name: str | None = None
    """One of the prompts in the model's files."""
    normalize: bool | None = None
    truncate_dim: Annotated[int, Meta(ge=1)] | None = None
    precision: Precision | None = None
    batch_size: Annotated[int, Meta(ge=1)] | None = None
    """Texts in one batch, at most."""
    max_seq_length: Annotated[int, Meta(ge=1)] | None = None
    """Tokens of a text that the model uses; default: the model's own bound."""
    truncate: bool | None = None
    """false: a longer text is an error, and nothing is cut."""
    pooling: Pooling | None = None
    dtype: Dtype | None = None
