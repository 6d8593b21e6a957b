"""Plans batches of prompts of similar length.

Transformers' continuous batching reached two thirds of this throughput on two CPU cores (`scripts/bench`). It was not
measured on a GPU, where vLLM is the engine to use.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One sequence of a batch: answer number `copy` to a request."""

    request: int
    copy: int


Batch = list[Row]


def plan(
    lengths: Sequence[tuple[int, int]],
    *,
    copies: int,
    new_tokens: int,
    max_positions: int | None,
    batch_tokens: int,
    batch_rows: int,
) -> list[Batch]:
    """Batches of prompts of similar length, longest first, so that a shortage of memory shows at once.

    Args:
        lengths: (request, tokens of its prompt).
        copies: answers to each request.
        new_tokens: tokens that an answer may have.
        max_positions: tokens that prompt and answer may have together; None: any. Where they may reach it, a batch has
            prompts of one length: a longer one's row would go on past it, for as long as the shorter ones answer.
        batch_tokens: limit of rows × (longest prompt + new tokens); a longer row is a batch by itself.
        batch_rows: limit of rows.
    """
    batches: list[Batch] = []
    current: Batch = []
    limit = longest = 0
    for request, length in sorted(lengths, key=lambda pair: -pair[1]):
        tight = max_positions is not None and longest + new_tokens > max_positions and length < longest
        for copy in range(copies):
            if not current or len(current) >= limit or (tight and copy == 0):
                longest = length
                row_tokens = length + new_tokens
                if max_positions is not None:
                    row_tokens = max(min(row_tokens, max_positions), 1)
                limit = max(min(batch_tokens // row_tokens, batch_rows), 1)
                current = []
                batches.append(current)
            current.append(Row(request, copy))
    return batches


def cache_bytes_per_token(config: object, dtype_bytes: int) -> int:
    """Key-value cache of one token, in bytes, by a model's text config; an upper bound where layers share theirs."""
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 4096) // heads
    layers = getattr(config, "num_hidden_layers", None) or 32
    return 2 * layers * kv_heads * head_dim * dtype_bytes
