"""Checks one row of data and converts it to its trainer's columns.

Errors name the row's place: file and line, item number, or dataset row.
"""

from __future__ import annotations

import json
import math
from typing import Any

from flowmesh.validation.json_paths import PathError
from flowmesh.validation.names import kind, listed
from runners.api import BadRequest
from runners.data.prompts import check_text, lines_of
from runners.data.tables import cell
from runners.training import pairs
from runners.training.plan import Plan
from runners.training.sources import Column, ExampleData, PreferenceData, TextData

EXTRAS = ("tools", "chat_template_kwargs", "weight", "margin")
"""Columns that are read without being named in the task; see `_extras`."""
LABELS = {"true": True, "false": False, "1": True, "0": False}
"""Labels as text files spell them."""
REFUSED = ("functions", "documents", "image", "images", "audio", "audios", "video", "videos")
"""Columns with a meaning for chat models that no trainer here reads."""


def shape(row: Any, columns: list[Column], where: str, plan: Plan) -> dict[str, Any]:
    """`row` in the trainer's columns.

    Raises:
        BadRequest: a column is missing, has an unusable value, or would have no effect.
    """
    if not isinstance(row, dict):
        raise BadRequest(f"{where}: a mapping with {', '.join(c.name for c in columns)} is needed, found {kind(row)}")
    if columns[0].role == "text" and _is_chat_instead(row, columns[0], plan):
        columns = [Column("messages", "messages", columns[0].setting)]
    found: dict[str, Any] = {}
    for column in columns:
        try:
            value = cell(row, column.name)
        except PathError:
            if column.required:
                raise BadRequest(f"{where}: {missing(column, list(row))}") from None
            continue
        if value is not None or column.required:
            found[column.role] = checked(value, column, where, plan)
    if plan.kind.rewarded:  # rewards may look at any other column
        taken = {column.name for column in columns}
        for name in ("tools", "chat_template_kwargs"):
            if row.get(name):
                raise BadRequest(
                    f"{where}: column {name!r} would have no effect: {plan.kind.task_type} formats prompts without it; "
                    "leave it out, or rename it where a reward reads it"
                )
        found |= {key: value for key, value in row.items() if key not in found and key not in taken}
    else:
        taken = {column.name for column in columns}
        found |= _extras({key: value for key, value in row.items() if key not in taken}, where, plan)
    check_text(found, where)
    if isinstance(plan.data, TextData):
        return _joined(found, where, plan)
    if isinstance(plan.data, PreferenceData):
        needs_prompt = plan.kind.head == "causal"
        if needs_prompt and "prompt" not in found and all(isinstance(found[side], str) for side in pairs.SIDES):
            raise BadRequest(f"{where}: {missing(columns[0], list(row))}")
        return pairs.preference(found, where, needs_prompt=needs_prompt)
    if isinstance(plan.data, ExampleData):
        return pairs.example(found, where)
    return found


def missing(column: Column, there: list[str]) -> str:
    return f"no column {column.name!r} ({column.setting}); there are: {listed(there, quoted=True)}"


def checked(value: Any, column: Column, where: str, plan: Plan) -> Any:
    """`value` if it fits its column."""
    place = f"{where}: column {column.name!r}"
    if column.role == "label":
        known = LABELS.get(value.lower()) if isinstance(value, str) else bool(value) if value in (0, 1) else None
        if known is not None:
            return known
        raise BadRequest(f"{place}: true or false is needed, found {kind(value)}")
    if column.role == "response" and plan.kind.rewarded:
        return value  # rewards compare with the document's own value
    if column.role != "messages" and (lines := lines_of(value)) is not None:
        value = lines
    if isinstance(value, dict) and column.role in ("chosen", "rejected", "completion", "response"):
        value = [value]
    if isinstance(value, list) and value:
        return chat(value, place, plan)
    if not isinstance(value, str):
        raise BadRequest(f"{place}: a text or a list of chat messages is needed, found {kind(value)}")
    if column.role == "messages":
        raise BadRequest(f"{place}: a list of chat messages is needed, found a text")
    if column.role == "prompt" and not value:
        raise BadRequest(f"{place}: the prompt is empty")
    return value


def chat(messages: list[Any], place: str, plan: Plan) -> list[dict[str, Any]]:
    """The messages with all keys that are set. A turn with tool calls alone gets an empty content."""
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRequest(f"{place}: message {i} must be {{role, content}} with texts, found {kind(message)}")
        kept = {key: value for key, value in message.items() if value is not None}
        if kept.get("tool_calls"):
            kept.setdefault("content", "")
        if not all(isinstance(kept.get(key), str) for key in ("role", "content")):
            raise BadRequest(f"{place}: message {i} must be {{role, content}} with texts, found {kind(message)}")
        if "weight" in kept:
            weight = _weight(kept["weight"], f"{place}: message {i}", plan)
            kept = {key: value for key, value in kept.items() if key != "weight"} | ({} if weight else {"weight": 0})
        found.append({"role": kept["role"], "content": kept["content"], **kept})
    return found


def _extras(rest: dict[str, Any], where: str, plan: Plan) -> dict[str, Any]:
    """Columns besides the texts that the trainer can use.

    `tools` and `chat_template_kwargs` go to the chat template, `weight` to sft's loss, `margin` to reward's.
    """
    found: dict[str, Any] = {}
    for name in REFUSED:
        if rest.get(name):
            hint = "give tools instead" if name == "functions" else f"{plan.kind.task_type} trains on text alone"
            raise BadRequest(f"{where}: column {name!r} would have no effect; {hint}, or leave the column out")
    if rest.get("tools"):
        found["tools"] = json.dumps(_tools(rest["tools"], where))
    if rest.get("chat_template_kwargs"):
        if not isinstance(rest["chat_template_kwargs"], dict):
            raise BadRequest(f"{where}: column 'chat_template_kwargs': a mapping is needed")
        found["chat_template_kwargs"] = rest["chat_template_kwargs"]
    if rest.get("weight") is not None and not _weight(rest["weight"], where, plan):
        found["weight"] = 0
    if rest.get("margin") is not None and plan.kind.task_type == "reward":
        margin = rest["margin"]
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            shown = margin if isinstance(margin, float) else kind(margin)
            raise BadRequest(f"{where}: column 'margin': a finite number is needed, found {shown}")
        found["margin"] = float(margin)
    return found


def _tools(given: Any, where: str) -> list[Any]:
    """JSON schemas of a row's tools, given as a list or as its JSON text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise BadRequest(f"{where}: column 'tools': not JSON: {error}") from None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise BadRequest(f"{where}: column 'tools': a list of JSON schemas is needed, found {kind(given)}")
    return given


def _weight(given: Any, where: str, plan: Plan) -> bool:
    """Whether what has this weight is trained on."""
    if given not in (0, 1):
        shown = given if isinstance(given, int | float) else kind(given)
        raise BadRequest(
            f"{where}: weight {shown}: only 0 (left out of the loss) and 1 are supported; repeat the row instead"
        )
    if given == 0 and not isinstance(plan.data, TextData):
        raise BadRequest(f"{where}: weight 0: {plan.kind.task_type} has no weights; leave the row or the message out")
    return bool(given)


def _is_chat_instead(row: dict[str, Any], text: Column, plan: Plan) -> bool:
    """Whether a row has `messages` and the task names no text column."""
    return text.name == "text" and "text" not in row and "messages" in row and isinstance(plan.data, TextData)


def _joined(found: dict[str, Any], where: str, plan: Plan) -> dict[str, Any]:
    """Join sft's prompt and response to one text or one chat; name a column of chats `messages`."""
    assert isinstance(plan.data, TextData)
    if "prompt" in found:
        prompt, response = found.pop("prompt"), found.pop("response")
        if isinstance(response, str) and not response.strip():
            found["text"] = ""  # nothing to answer with, such as an empty cell of a table: dropped, and counted
        elif isinstance(prompt, str) and isinstance(response, str):
            found["text"] = f"{prompt}{plan.data.separator_of(jsonl=plan.source == 'jsonl')}{response}"
        else:
            found["messages"] = [*pairs.turns(prompt, "user"), *pairs.turns(response, "assistant")]
    elif isinstance(found.get("text"), list):
        found["messages"] = found.pop("text")
    for name in ("tools", "chat_template_kwargs"):
        if "text" in found and name in found:
            raise BadRequest(f"{where}: column {name!r} would have no effect: the row is a text and no chat")
    return found
