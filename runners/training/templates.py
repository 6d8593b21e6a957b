"""Applies chat templates with the row named in errors, and finds keys that a template ignores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from runners.api import BadRequest

Where = Callable[[], str]
WITHOUT_EFFECT = {"tool": ("tool_call_id", "name")}
"""Identifiers, by role, that a template may ignore."""
_MARK = "flowmesh"


def options(row: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `apply_chat_template` from a row."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if tools else None, **(row.get("chat_template_kwargs") or {})}


def ids(tokenizer: Any, chat: list[dict[str, Any]], where: Where, **more: Any) -> list[int]:
    """Tokens of a chat.

    Args:
        where: the row's place.
        more: for `apply_chat_template`.

    Raises:
        BadRequest: the template refuses the chat, for example a system turn; names the row.
    """
    return list(written(tokenizer, chat, where, return_dict=False, **more))


def written(tokenizer: Any, chat: list[dict[str, Any]], where: Where, **more: Any) -> Any:
    """`apply_chat_template`, with the row named in errors."""
    try:
        return tokenizer.apply_chat_template(chat, **more)
    except Exception as error:  # templates raise jinja's errors and any of their expressions'
        roles = ", ".join(str(message["role"]) for message in chat)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRequest(f"{where()}: the model's chat template refuses this chat ({roles}): {reason:.300}") from error


def check_keys(tokenizer: Any, chat: list[dict[str, Any]], row: dict[str, Any], where: Where) -> None:
    """Raises BadRequest for a message key or a column of the row that the template ignores."""
    given = options(row)
    template = tokenizer.get_chat_template(tools=given["tools"])
    for name in [name for name, value in given.items() if value is not None]:
        if not _names(template, name):
            raise BadRequest(
                f"{where()}: {name} would have no effect: the model's chat template does not read it; leave it out, or "
                "use a model whose template does"
            )
    for i, message in enumerate(chat):
        for key in message.keys() - {"role", "content", "weight", *WITHOUT_EFFECT.get(message["role"], ())}:
            plain = [*chat[:i], {k: v for k, v in message.items() if k != key}, *chat[i + 1 :]]
            if _names(template, key):
                continue
            texts = [written(tokenizer, each, where, tokenize=False, **given) for each in (chat, plain)]
            if texts[0] == texts[1]:  # they differ if the template writes whole messages
                raise BadRequest(
                    f"{where()}: {key} of message {i} would have no effect: the model's chat template does not read "
                    "it; leave it out, or use a model whose template does"
                )


def _names(template: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text with one begin token, also where the text already starts with it."""
    found = list(tokenizer(text)["input_ids"])
    begin = tokenizer.bos_token_id
    return found[1:] if begin is not None and found[:2] == [begin, begin] else found


def without_begin(tokenizer: Any, text: str) -> str:
    """`text` without a begin token that the tokenizer adds itself."""
    begin = tokenizer.bos_token_id
    twice = begin is not None and list(tokenizer(text)["input_ids"][:2]) == [begin, begin]
    return text.removeprefix(tokenizer.bos_token) if twice else text


def end_tokens(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the end-of-text token, and the template's end-of-turn token."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    turn = _end_of_turn(tokenizer)
    return ends if turn is None or turn in ends else [*ends, turn]


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first special token after an assistant's content; None if there is none."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # noqa: BLE001 - this template needs other chats; rows that fail are reported by `written`
        return None
    after = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in after if token in special), None)
