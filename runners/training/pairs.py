"""Brings preferences and labelled completions into one shape: the prompt once, and answers that start after it.

Published datasets have prompt and answers as texts; as chats; a text prompt and chats that start with it
(UltraFeedback); chats without a prompt that share their first turns; or texts that repeat the prompt.
"""

from __future__ import annotations

import itertools
from typing import Any

from runners.api import BadRequest

Chat = list[dict[str, Any]]
SIDES = ("chosen", "rejected")


def preference(row: dict[str, Any], where: str, *, needs_prompt: bool) -> dict[str, Any]:
    """`row` with `chosen` and `rejected` that start after `prompt`, all texts or all chats.

    Args:
        needs_prompt: split chats without a prompt where they start to differ; else keep them whole.

    Raises:
        BadRequest: the shapes do not match, or an answer is empty.
    """
    if any(isinstance(row.get(name), list) for name in ("prompt", *SIDES)):
        row = _as_chats(row, SIDES, where)
        if "prompt" not in row and needs_prompt:
            shared = _shared(row["chosen"], row["rejected"])
            if not shared:
                raise BadRequest(
                    f"{where}: chosen begins with {_start(row['chosen'])}, rejected with {_start(row['rejected'])}: "
                    "without a prompt, both must be chats that begin with the same turns"
                )
            row |= {"prompt": row["chosen"][:shared], **{side: row[side][shared:] for side in SIDES}}
    elif "prompt" in row:
        row |= {side: _after(row["prompt"], row[side]) for side in SIDES}
    _check_answers(row, SIDES, where)
    return row


def example(row: dict[str, Any], where: str) -> dict[str, Any]:
    """kto's `row` with a `completion` that starts after `prompt`; as `preference`."""
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        row = _as_chats(row, ("completion",), where)
    else:
        row |= {"completion": _after(row["prompt"], row["completion"])}
    _check_answers(row, ("completion",), where)
    return row


def turns(value: str | Chat, role: str) -> Chat:
    """A chat; a text is one turn of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _as_chats(row: dict[str, Any], sides: tuple[str, ...], where: str) -> dict[str, Any]:
    row = {**row, **{side: turns(row[side], "assistant") for side in sides}}
    if "prompt" not in row:
        return row
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = _told(prompt, [row[side] for side in sides]) or turns(prompt, "user")
    row["prompt"] = prompt
    for side in sides:
        answer = row[side]
        if _begins(answer, prompt):
            answer = answer[len(prompt) :]
        elif len(answer) > 1 and answer[0]["role"] in ("user", "system"):
            raise BadRequest(
                f"{where}: {side} begins with {_start(answer)}, which is not the prompt, {_start(prompt)}; "
                "give an answer that begins after the prompt, or one that repeats it"
            )
        row[side] = answer
    return row


def _told(prompt: str, answers: list[Chat]) -> Chat | None:
    """First turns of the answers, up to the user turn that equals `prompt`; None if there is none."""
    if len(answers) > 1 and (shared := _shared(*answers)) and _first_user(answers[0][:shared]) == prompt.strip():
        return answers[0][:shared]
    for answer in answers:
        if _first_user(answer) == prompt.strip():
            return answer[: 1 + next(i for i, message in enumerate(answer) if message["role"] == "user")]
    return None


def _first_user(chat: Chat) -> str | None:
    before = itertools.takewhile(lambda message: message["role"] != "assistant", chat)
    return next((message["content"].strip() for message in before if message["role"] == "user"), None)


def _begins(answer: Chat, prompt: Chat) -> bool:
    return len(answer) >= len(prompt) and all(_same(a, p) for a, p in zip(answer, prompt, strict=False))


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["role"] == other["role"] and one["content"].strip() == other["content"].strip())


def _shared(one: Chat, other: Chat) -> int:
    """Number of common first turns, ending with a turn to answer. Leaves each chat at least one turn."""
    most = min(len(one), len(other)) - 1
    count = next((i for i in range(most) if one[i] != other[i]), max(most, 0))
    while count and one[count - 1]["role"] in ("assistant", "system"):
        count -= 1
    return count


def _after(prompt: str, answer: str) -> str:
    """`answer` without a repeated prompt. A match that ends inside a word is no repetition."""
    rest = answer.removeprefix(prompt)
    if rest == answer or not rest or (prompt[-1].isalnum() and rest[0].isalnum()):
        return answer
    return rest


def _check_answers(row: dict[str, Any], sides: tuple[str, ...], where: str) -> None:
    for side in sides:
        if isinstance(row[side], list) and not row[side]:
            raise BadRequest(f"{where}: {side} holds the prompt alone, and no answer")


def _start(chat: Chat) -> str:
    return f"{{role: {chat[0]['role']}, content: {len(chat[0]['content'])} characters}}"
