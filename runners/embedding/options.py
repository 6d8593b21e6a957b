"""`spec.embedding`: the model that turns texts into vectors, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from runners.models.spec import Section

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class Embedding(Section, frozen=True):
    """spec.embedding"""

    model: Annotated[str, Meta(min_length=1)] | None = None
    """A hub id or a local folder that sentence-transformers can load."""
    revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] | None = None
    batch_tokens: Annotated[int, Meta(ge=16)] | None = None
    """Tokens, including padding, in one batch."""
    query_prompt: str | None = None
    """Prefix of each query; default: that of the model's files."""
    document_prompt: str | None = None
    trust_remote_code: bool | None = None
