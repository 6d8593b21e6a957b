"""Checks prompts against the chat template, and shortens them to leave room for a completion."""

from __future__ import annotations

import dataclasses
from typing import Any

from runners.api import BadRequest, Context
from runners.training import templates
from runners.training.bounds import Bounds
from runners.training.checkpoints import Start
from runners.training.data import CHATS, Rows, mapped


def check_chat(rows: Rows, tokenizer: Any, start: Start) -> None:
    """Raises BadRequest where rows are chats and the tokenizer has no template for them."""
    first = rows.dataset[0]
    chats = [name for name in CHATS if isinstance(first.get(name), list)]
    if chats and not tokenizer.chat_template:
        raise BadRequest(
            f"spec.data: {chats[0]} are chats, but the tokenizer of {start.weights.shown!r} has no chat template"
        )


def encode(prompt: Any, tokenizer: Any) -> list[int]:
    """Tokens of a prompt. A chat's end with the start of the assistant's turn."""
    if isinstance(prompt, str):
        return templates.text_ids(tokenizer, prompt)
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def fit(rows: Rows, tokenizer: Any, room: int, ctx: Context) -> Rows:
    """Cut the start of text prompts that have more than `room` tokens.

    Raises:
        BadRequest: a chat is longer and cannot be cut, or the template refuses it; names the row.
    """
    cut = 0

    def fitted(row: dict[str, Any], i: int) -> dict[str, Any]:
        nonlocal cut
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            templates.check_keys(tokenizer, prompt, {}, lambda: rows.where(i))
            ids = templates.ids(tokenizer, prompt, lambda: rows.where(i), add_generation_prompt=True)
            if len(ids) > room:
                raise BadRequest(
                    f"{rows.where(i)}: the chat has {len(ids)} tokens; "
                    f"{room} fit besides the answer in spec.training.max_seq_length"
                )
            return {"prompt": prompt}
        prompt = templates.without_begin(tokenizer, prompt)
        if len(tokenizer(prompt)["input_ids"]) <= room:
            return {"prompt": prompt}
        cut += 1
        kept = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        while kept and len(tokenizer(tokenizer.decode(kept))["input_ids"]) > room:
            kept = kept[max(1, len(kept) - room) if len(kept) > room else 1 :]
        return {"prompt": tokenizer.decode(kept)}

    dataset = rows.dataset
    found = mapped(dataset.select_columns("prompt"), fitted, ctx, name="prompts", features=_of(dataset, "prompt"))
    if cut:
        ctx.log.warning("prompts cut at their start room_tokens=%d cut=%d of=%d", room, cut, len(dataset))
    rest = dataset.remove_columns("prompt")
    fitting = _beside(found, rest) if rest.column_names else found
    return dataclasses.replace(rows, dataset=fitting, truncated=cut)


def check_bounds(rows: Rows, tokenizer: Any, bounds: Bounds, length: int) -> None:
    """Raises BadRequest where a prompt and `length` more tokens exceed the model's limits; names the row."""
    for i, prompt in enumerate(rows.dataset["prompt"]):
        bounds.check(encode(prompt, tokenizer), lambda i=i: rows.where(i), further=length)  # type: ignore[misc]


def _of(dataset: Any, name: str) -> Any:
    from datasets import Features

    return Features({name: dataset.features[name]})


def _beside(one: Any, other: Any) -> Any:
    """Join columns without converting those that rewards read."""
    from datasets import concatenate_datasets

    return concatenate_datasets([one, other], axis=1)
