"""Hits and the interface of searchers, common to FAISS and Qdrant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from runners.api import Context

if TYPE_CHECKING:
    import numpy as np


class Hit(msgspec.Struct, frozen=True):
    """One passage that was found."""

    id: str | int
    score: float
    payload: dict[str, Any]

    def text(self) -> str:
        """The passage's text, under one of its usual names in payloads; else the whole payload as JSON."""
        for name in ("text", "content", "page_content", "document", "passage", "chunk", "body"):
            if isinstance(value := self.payload.get(name), str) and value:
                return value
        return msgspec.json.encode(self.payload, enc_hook=str).decode()


class Searcher(Protocol):
    """Finds the nearest passages of vectors."""

    name: str
    """The field of the result that holds `describe()`."""

    def search(self, ctx: Context, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """Each query's hits, best first.

        Raises:
            BadRequest: the vectors do not fit.
            RunnerError: a server does not answer.
            Cancelled: the node asked the task to stop.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Its description in the result, including `count`, the number of passages."""
        ...

    @property
    def digest(self) -> str:
        """Identity of the passages and of how they are searched; empty: they may change from one search to the next."""
        ...

    def notes(self) -> dict[str, Any]:
        """Further top-level fields of the result."""
        ...
