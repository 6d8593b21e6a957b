"""Prompts that leave room for an answer, and chats that the tokenizer can write."""

from __future__ import annotations

from typing import Any

from runners.api import BadRequest
from runners.training.checkpoints import Start

CHATS = ("messages", "prompt", "chosen", "rejected", "completion")


def check_chat(dataset: Any, tokenizer: Any, start: Start) -> None:
    """Raises BadRequest where rows are chats and the tokenizer has no template for them."""
    first = dataset[0]
    chats = [name for name in CHATS if isinstance(first.get(name), list)]
    if chats and not tokenizer.chat_template:
        raise BadRequest(
            f"spec.data: {chats[0]} are chats, but the tokenizer of {start.weights.shown!r} has no chat template"
        )


def encode(prompt: Any, tokenizer: Any) -> list[int]:
    """A prompt's tokens; a chat's end where the assistant's turn begins."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def fit(dataset: Any, tokenizer: Any, room: int) -> Any:
    """The dataset with no prompt over `room` tokens: a text loses its beginning.

    Raises:
        BadRequest: a chat is longer, which cannot be cut.
    """

    def cut(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = row["prompt"]
        ids = encode(prompt, tokenizer)
        if len(ids) <= room:
            return row
        if not isinstance(prompt, str):
            raise BadRequest(
                f"spec.data: the chat of row {index} has {len(ids)} tokens; "
                f"{room} fit besides the answer in spec.training.max_seq_length"
            )
        kept = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        while kept and len(tokenizer(tokenizer.decode(kept))["input_ids"]) > room:
            kept = kept[max(1, len(kept) - room) if len(kept) > room else 1 :]
        return {**row, "prompt": tokenizer.decode(kept)}

    return dataset.map(cut, with_indices=True, keep_in_memory=True, load_from_cache_file=False)
