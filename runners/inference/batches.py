"""Plans batches of requests whose prompts and answers are of similar length.

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


class Need(msgspec.Struct, frozen=True):
    """What one request needs."""

    request: int
    length: int
    """Tokens of its prompt."""
    new_tokens: int
    """Tokens that an answer may have."""
    copies: int
    """Answers."""


Batch = list[Row]


def plan(needs: Sequence[Need], *, max_positions: int | None, batch_tokens: int, batch_rows: int) -> list[Batch]:
    """Batches of similar requests, the longest first, so that a shortage of memory shows at once.

    Requests whose answers may have many tokens do not share a batch with those that end soon, as far as the answers'
    limits differ by more than a factor of two.

    Args:
        max_positions: tokens that prompt and answer may have together; None: any. Where they may reach it, a batch has
            prompts of one length: a longer one's row would go on past it, for as long as the shorter ones answer.
        batch_tokens: limit of rows × (longest prompt + longest answer); a longer row is a batch by itself.
        batch_rows: limit of rows.
    """
    batches: list[Batch] = []
    current: Batch = []
    limit = longest = 0
    kind = -1
    most: dict[int, int] = {}
    for need in needs:
        most[_kind(need)] = max(most.get(_kind(need), 0), need.new_tokens)
    for need in sorted(needs, key=lambda each: (-_kind(each), -each.length)):
        new_tokens = most[_kind(need)]
        tight = max_positions is not None and longest + new_tokens > max_positions and need.length < longest
        for copy in range(need.copies):
            ends = tight or (kind != _kind(need))
            if not current or len(current) >= limit or (ends and copy == 0):
                longest, kind = need.length, _kind(need)
                row_tokens = longest + new_tokens
                if max_positions is not None:
                    row_tokens = max(min(row_tokens, max_positions), 1)
                limit = max(min(batch_tokens // row_tokens, batch_rows), 1)
                current = []
                batches.append(current)
            current.append(Row(need.request, copy))
    return batches


def _kind(need: Need) -> int:
    """Requests of one kind have limits of their answers within a factor of two: the exponent of the next power."""
    return max(need.new_tokens - 1, 0).bit_length()


def cache_bytes_per_token(config: object, dtype_bytes: int) -> int:
    """Key-value cache of one token, in bytes, by a model's text config; an upper bound where layers share theirs."""
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 4096) // heads
    layers = getattr(config, "num_hidden_layers", None) or 32
    return 2 * layers * kv_heads * head_dim * dtype_bytes
