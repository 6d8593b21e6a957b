"""A hit, and what finds hits: the same for FAISS and Qdrant."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import numpy as np

from runners.api import Context


class Hit(msgspec.Struct, frozen=True):
    """One passage that was found."""

    id: str | int
    score: float
    payload: dict[str, Any]

    def text(self) -> str:
        """The passage itself, by the names that payloads usually have for it; else all of the payload."""
        for name in ("text", "content", "page_content", "document", "passage", "chunk", "body"):
            if isinstance(value := self.payload.get(name), str) and value:
                return value
        return msgspec.json.encode(self.payload, enc_hook=str).decode()


class Searcher(Protocol):
    """Something that can be asked for neighbours."""

    name: str
    """The result's field that describes it."""

    def search(self, ctx: Context, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """Each query's hits, best first.

        Raises:
            BadRequest: the vectors do not fit.
            RunnerError: a server does not answer.
            Cancelled: the node asked the task to stop.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the result says about it, with the `count` of what it holds."""
        ...

    def notes(self) -> dict[str, Any]:
        """Fields of the result itself."""
        ...
