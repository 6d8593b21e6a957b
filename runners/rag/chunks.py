"""Cuts documents into passages of a number of tokens, with an overlap, at the end of a sentence if possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest

DEFAULT_TOKENS = 256
OVERLAP_SHARE = 8
LATEST_CUT = 3 / 4
"""A passage may end early, at a sentence or a word, but not before this fraction of its length."""
_SENTENCE_ENDS = ".!?。！？\n"


class Window(msgspec.Struct, frozen=True):
    """How documents are cut."""

    tokens: int
    overlap: int


def window(tokens: int | None, overlap: int | None, *, model_takes: int | None, where: str) -> Window:
    """The task's settings with the defaults filled in.

    Args:
        model_takes: tokens of a text that the embedding model uses, without special tokens and its prompt.

    Raises:
        BadRequest: passages would be longer than that.
    """
    if tokens is not None and model_takes is not None and tokens > model_takes:
        raise BadRequest(
            f"{where}.tokens: {tokens}, but the embedding model looks at {model_takes} tokens of a text; "
            f"give at most {model_takes}"
        )
    size = tokens or min(DEFAULT_TOKENS, model_takes or DEFAULT_TOKENS)
    shared = size // OVERLAP_SHARE if overlap is None else overlap
    if shared > size // 2:
        raise BadRequest(f"{where}.overlap: {shared} of {size} tokens; at most half of them can be shared")
    return Window(size, shared)


def split(text: str, offsets: Sequence[tuple[int, int]], cut: Window) -> list[str]:
    """The passages of a document, in order; every token is in at least one, none is longer than `cut.tokens`.

    Args:
        offsets: where in `text` each token begins and ends.
    """
    if len(offsets) <= cut.tokens:
        return [text.strip()] if text.strip() else []
    passages: list[str] = []
    start = 0
    while True:
        end = min(start + cut.tokens, len(offsets))
        if end < len(offsets):
            end = _good_end(text, offsets, start, end)
        passage = text[offsets[start][0] : offsets[end - 1][1]].strip()
        if passage:
            passages.append(passage)
        if end == len(offsets):
            return passages
        start = max(end - cut.overlap, start + 1)


def token_offsets(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Where each token of each text begins and ends.

    Raises:
        BadRequest: the model's tokenizer does not give offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BadRequest(
            "spec.embedding.model: its tokenizer does not give the offsets of tokens, so documents cannot be cut; "
            "choose a model with a tokenizer.json"
        )
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    return [list(each) for each in encoded["offset_mapping"]]


def _good_end(text: str, offsets: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """The last token after which a sentence, else a word ends, not far before `end`."""
    earliest = start + max(int((end - start) * LATEST_CUT), 1)
    word_end = 0
    for at in range(end, earliest - 1, -1):
        between = text[offsets[at - 1][1] : offsets[at][0]]
        if not between:
            continue  # in the middle of a word, or before a full stop
        if text[offsets[at - 1][1] - 1] in _SENTENCE_ENDS or "\n" in between:
            return at
        word_end = word_end or at
    return word_end or end
