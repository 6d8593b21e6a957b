"""Limits of the model to train. Rows beyond them are errors here, instead of an index error inside a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runners.models import limits
from runners.training.templates import Where


class Bounds:
    """Number of positions and of embeddings of a model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._positions = limits.positions(model)
        self._embeddings = limits.embedding_rows(model)
        self._tokenizer = tokenizer
        self._model = model

    def check(self, ids: Sequence[int], where: Where, *, further: int = 0) -> None:
        """
        Args:
            further: tokens that will come after `ids`.

        Raises:
            BadRequest: the row has a token without an embedding, or more tokens than there are positions; names it.
        """
        if self._positions is not None and len(ids) + further > self._positions:
            limits.check_length(len(ids) + further, self._model, where())
        if self._embeddings is not None and max(ids, default=0) >= self._embeddings:
            limits.check_token_ids(ids, self._embeddings, self._tokenizer, where())
