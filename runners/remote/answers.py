"""What an endpoint answered: the item's entry, its tokens, and whether it is a whole answer."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from runners.remote.task import Endpoint, Prices

FINISHED = frozenset(
    ("stop", "tool_calls", "function_call", "eos", "end_turn", "stop_sequence", "tool_use", "complete")
)
MILLION = 1_000_000


class BadAnswer(Exception):
    """The body is not an answer. Another attempt may get one."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one request, as the endpoint reports them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's."""


class Answer(msgspec.Struct, frozen=True):
    """One answer."""

    fields: dict[str, Any]
    """Of the item."""
    usage: Usage | None
    """None: the endpoint gives none."""
    problem: str = ""
    """Why it is no whole answer: `length`, `content_filter`, `refusal` …; empty: it is one."""


def read_answer(kind: Endpoint, body: Any) -> Answer:
    """
    Raises:
        BadAnswer: it is no answer of such an endpoint.
    """
    try:
        if kind == "embeddings":
            return _vector(body)
        choice = body["choices"][0]
        usage = _usage(body.get("usage"))
        reason = str(choice.get("finish_reason") or "")
        if kind == "completions":
            text = choice["text"]
            if not isinstance(text, str):
                raise TypeError("its text is none")
            return Answer({"output": text, "finish_reason": reason}, usage, _problem(reason, "", bool(text)))
        return _chat(choice, reason, usage)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadAnswer(f"gave an answer that is none ({type(error).__name__}: {str(error)[:100]})") from None


def cost_usd(usage: Usage | None, prices: Prices | None) -> float | None:
    """None: not known."""
    if usage is None or prices is None:
        return None
    cached = prices.input if prices.cached_input is None else prices.cached_input
    fresh = max(usage.prompt_tokens - usage.cached_tokens, 0)
    total = fresh * prices.input + usage.cached_tokens * cached + usage.completion_tokens * prices.output
    return total / MILLION


def estimated_tokens(body: dict[str, Any]) -> int:
    """Of a request and its answer, before it is sent: four bytes are about a token."""
    text = sum(
        len(json.dumps(body[name], ensure_ascii=False)) for name in ("messages", "prompt", "input") if name in body
    )
    return text // 4 + 1 + most_tokens(body)


def most_tokens(body: dict[str, Any]) -> int:
    """Tokens that an answer may have; 0: the request does not say."""
    answer = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return answer if isinstance(answer, int) else 0


def _chat(choice: dict[str, Any], reason: str, usage: Usage | None) -> Answer:
    message = choice["message"]
    text, calls, refusal = message.get("content"), message.get("tool_calls"), message.get("refusal")
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    if text is not None and not isinstance(text, str):
        raise TypeError("the message's content is no text")
    fields: dict[str, Any] = {"output": text or "", "finish_reason": reason}
    thought = message.get("reasoning") or message.get("reasoning_content")
    for name, value in (("reasoning", thought), ("tool_calls", calls), ("refusal", refusal)):
        if value:
            fields[name] = value
    if choice.get("logprobs"):
        fields["logprobs"] = choice["logprobs"]
    return Answer(fields, usage, _problem(reason, refusal, bool(text or calls)))


def _problem(reason: str, refusal: Any, has_content: bool) -> str:
    if refusal:
        return "refusal"
    if reason.lower() not in FINISHED:
        return reason or "no finish_reason"
    return "" if has_content else "empty"


def _vector(body: Any) -> Answer:
    entries = body["data"]
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} vectors for one text")
    vector = entries[0]["embedding"]
    if not isinstance(vector, list) or not vector or not all(_is_number(each) for each in vector):
        raise TypeError("its embedding is no list of finite numbers")
    return Answer({"embedding": vector}, _usage(body.get("usage")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _usage(given: Any) -> Usage | None:
    if not isinstance(given, dict) or not isinstance(given.get("prompt_tokens"), int):
        return None
    details = given.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    completion = given.get("completion_tokens")
    return Usage(
        prompt_tokens=given["prompt_tokens"],
        completion_tokens=completion if isinstance(completion, int) else 0,
        cached_tokens=cached if isinstance(cached, int) else 0,
    )
