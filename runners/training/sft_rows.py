"""Tokenizes sft's rows as TRL does. Rows and messages of weight 0 are left out of the loss."""

from __future__ import annotations

import re
from typing import Any

from trl import get_training_chat_template
from trl.data_utils import common_prefix_length

from runners.api import BadRequest
from runners.training import templates
from runners.training.templates import Where

MASKED = -100
"""Label of a token without a loss."""


class SftRows:
    """Makes `input_ids` and `labels` for one row at a time."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        if config.completion_only_loss:
            raise BadRequest(
                "spec.training.trainer_args.completion_only_loss: would have no effect on whole texts; give chats in "
                "spec.data.messages, and assistant_only_loss"
            )
        self._tokenizer = tokenizer
        self._assistant_only = config.assistant_only_loss
        self._marked: str | None = None
        """A chat template with generation markers, where the loss needs them and the model's own has none."""
        if self._assistant_only and not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or ""):
            try:
                self._marked = get_training_chat_template(tokenizer)
            except ValueError as error:
                raise BadRequest(
                    f"spec.training.trainer_args.assistant_only_loss: {' '.join(str(error).split()):.300}"
                ) from error

    def tokens(self, row: dict[str, Any], where: Where) -> dict[str, list[int]]:
        """`input_ids` and `labels` of `row`.

        Raises:
            BadRequest: the row cannot be tokenized as the task asks; names the row.
        """
        text = row.get("text")
        if row.get("weight") == 0 or (text is not None and not text.strip()):
            return {"input_ids": [], "labels": []}
        if row.get("messages") is not None:
            ids, kept = self._chat(row, where)
        elif self._assistant_only:
            raise BadRequest(f"{where()}: trainer_args.assistant_only_loss needs chats, and this row is a text")
        else:
            assert text is not None, "a row has a text or a chat"
            end = self._tokenizer.eos_token or ""
            ids = templates.text_ids(self._tokenizer, text if text.endswith(end) else text + end)
            kept = [True] * len(ids)
        return {"input_ids": ids, "labels": [i if keep else MASKED for i, keep in zip(ids, kept, strict=True)]}

    def _chat(self, row: dict[str, Any], where: Where) -> tuple[list[int], list[bool]]:
        chat = [{key: value for key, value in message.items() if key != "weight"} for message in row["messages"]]
        templates.check_keys(self._tokenizer, chat, row, where)
        more = templates.options(row)
        if not self._assistant_only:
            ids = templates.ids(self._tokenizer, chat, where, **more)
            kept = [True] * len(ids)
        else:
            marked = {"chat_template": self._marked} if self._marked else {}
            found = templates.written(
                self._tokenizer, chat, where, return_dict=True, return_assistant_tokens_mask=True, **marked, **more
            )
            ids, kept = list(found["input_ids"]), [bool(bit) for bit in found["assistant_masks"]]
            if not any(kept):
                raise BadRequest(f"{where()}: trainer_args.assistant_only_loss: the chat has no turn of the assistant")
        for i, message in enumerate(row["messages"]):
            if message.get("weight") == 0:
                start, end = self._bounds(chat, i, ids, where, more)
                kept[start:end] = [False] * (end - start)
        return ids, kept

    def _bounds(
        self, chat: list[dict[str, Any]], i: int, ids: list[int], where: Where, more: dict[str, Any]
    ) -> tuple[int, int]:
        """First token of message `i` and the one after its last, from the chats that end before and with it."""
        ends = [
            common_prefix_length(templates.ids(self._tokenizer, chat[:count], where, **more), ids) if count else 0
            for count in (i, i + 1)
        ]
        if ends[1] <= ends[0]:
            raise BadRequest(
                f"{where()}: weight 0 of message {i}: the model's chat template formats it differently in a longer chat"
            )
        return ends[0], ends[1]
