"""Reads what a model writes besides its answer: reasoning, and calls of tools.

How it writes them is in its tokenizer's `response_template`; for some families Transformers' server knows it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()


def template_of(tokenizer: Any, model: Any) -> dict[str, Any] | None:
    """How the model writes its messages; None: it is not known."""
    from transformers.cli.serving.utils import get_response_template

    found: dict[str, Any] | None = get_response_template(tokenizer, model)
    return found


def calls_tools(template: dict[str, Any] | None) -> bool:
    return template is not None and "tool_calls" in template.get("fields", {})


class Message:
    """One message, which is read as it grows.

    Args:
        template: see `template_of`.
        prompt: the text that the message continues.
        tools: that were offered; without any, calls stay in the text.
        one_call: whether only the first call counts.
    """

    def __init__(
        self, template: dict[str, Any], prompt: str, tools: Sequence[dict[str, Any]], *, one_call: bool = False
    ) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        if not tools:
            fields = {name: each for name, each in template["fields"].items() if name != "tool_calls"}
            template = template | {"fields": fields}
        self._parser: Any = ResponseParser(template, prefix=prompt, tools=list(tools))
        self._one_call = one_call
        self._unread = ""
        """Text that may belong to a call that is not complete."""
        self._in_call = self._broken = False
        self.calls = 0

    def add(self, text: str) -> Piece:
        """What has become certain by some more text."""
        if self._broken:
            return Piece(content=text)
        self._unread += text
        try:
            piece = self._piece(self._parser.feed(text))
        except Exception:  # noqa: BLE001 - what a model wrote may be anything
            return self._give_up()
        if not self._in_call:
            self._unread = ""
        elif piece.content:
            self._unread = text.rpartition(piece.content)[2]
        return piece

    def end(self) -> Piece:
        """The rest. A call that cannot be read stays text."""
        if self._broken:
            return Piece()
        try:
            return self._piece(self._parser.finalize()[1])
        except Exception:  # noqa: BLE001 - likewise
            return self._give_up()

    def _give_up(self) -> Piece:
        self._broken = True
        return Piece(content=self._unread)

    def _piece(self, events: Sequence[dict[str, Any]]) -> Piece:
        texts = {"content": "", "thinking": ""}
        calls = []
        for event in events:
            field, kind = event.get("field"), event["type"]
            self._in_call = field == "tool_calls" and kind != "region_close"
            if kind == "region_chunk" and field in texts and not event.get("dirty"):
                texts[field] += event.get("text") or ""
            elif kind == "region_close" and field == "tool_calls" and not (self._one_call and self.calls):
                calls.append(_call(event["value"], self.calls))
                self.calls += 1
        return Piece(content=texts["content"], reasoning=texts["thinking"], calls=tuple(calls))


def _call(value: dict[str, Any], index: int) -> dict[str, Any]:
    """A call as OpenAI writes it in a stream; without the index, as in a message."""
    function = value["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments).decode()
    return {
        "index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }  # fmt: skip
