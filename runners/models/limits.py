"""Limits of a model's input: the number of positions and the ids with an embedding.

Beyond either, a model raises "index out of range in self", or on a GPU a device-side assertion.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from runners.api import BadRequest


def positions(model: Any) -> int | None:
    """Tokens that the model takes at a time; None: any number.

    Args:
        model: of Transformers, or its configuration alone, which does not show what RoBERTa and its kin count off.
    """
    config = getattr(model, "config", model).get_text_config()
    count = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if count is None or count <= 0:
        return None
    for name, module in getattr(model, "named_modules", list)():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and module.num_embeddings == count:
            return int(count - padding - 1)  # its first rows belong to padding
    return int(count)


def check_length(tokens: int, model: Any, where: str) -> None:
    """Raises BadRequest where a text has more tokens than the model has positions."""
    count = positions(model)
    if count is not None and tokens > count:
        raise BadRequest(f"{where}: has {tokens} tokens, and the model has {count} positions; shorten it")


def embedding_rows(model: Any) -> int | None:
    """Token ids that the model has embeddings for: 0 up to this."""
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is None and getattr(embeddings, "weight", None) is not None:  # in an adapter's wrapper
        rows = embeddings.weight.shape[0]
    return int(rows) if rows is not None else None


def check_token_ids(token_ids: Iterable[int], rows: int | None, tokenizer: Any, where: str) -> None:
    """Raises BadRequest for a token that the model has no embedding for.

    Args:
        rows: see `embedding_rows`.
        where: what the text is called in an error.
    """
    if rows is None:
        return
    for token_id in token_ids:
        if not 0 <= token_id < rows:
            token = tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
            raise BadRequest(
                f"{where}: token {token!r} has id {token_id}, and the model has embeddings for {rows} tokens (0 to "
                f"{rows - 1}); its tokenizer has tokens that it was not trained with"
            )
