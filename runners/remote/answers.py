"""What an endpoint answered: the item's entry, its tokens, and whether it is a whole answer."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from runners.agent.completions import error_text
from runners.agent.written import encodable
from runners.remote.task import Endpoint, Prices

FINISHED = frozenset(
    ("stop", "tool_calls", "function_call", "eos", "end_turn", "stop_sequence", "tool_use", "complete")
)
CALLING = frozenset(("tool_calls", "tool_use"))
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


def read_answer(kind: Endpoint, body: Any, model: str) -> Answer:
    """
    Args:
        model: what the request names. An item has the answer's where that is another.

    Raises:
        BadAnswer: it is no answer of such an endpoint, or an error.
    """
    body = read_json(body, "data" if kind == "embeddings" else "choices")
    try:
        named = body.get("model")
        other = {"model": encodable(named)} if isinstance(named, str) and named not in ("", model) else {}
        if kind == "embeddings":
            return Answer({**_vector(body), **other}, _usage(body.get("usage")))
        choice = next((each for each in body["choices"] if each.get("index") in (0, None)), body["choices"][0])
        _refuse_error(choice)
        choice = _encodable(choice)
        usage = _usage(body.get("usage"))
        reason = str(choice.get("finish_reason") or "")
        if kind == "completions":
            text = choice["text"]
            if not isinstance(text, str):
                raise TypeError("its text is none")
            problem = _problem(reason, "", text=text)
            return Answer({"output": text, "finish_reason": reason, **other}, usage, problem)
        fields, problem = _chat(choice, reason)
        return Answer({**fields, **other}, usage, problem)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BadAnswer(f"gave an answer that is none ({type(error).__name__}: {str(error)[:100]})") from None


def read_json(body: Any, needed: str) -> Any:
    """The JSON of an answer with status 200.

    Args:
        body: its JSON, or its text where the endpoint gives it another content type.
        needed: the field that an answer has.

    Raises:
        BadAnswer: it is no JSON, or an error.
    """
    try:
        body = json.loads(body) if isinstance(body, str) else body
    except (ValueError, RecursionError):
        raise BadAnswer(f"gave an answer that is no JSON: {error_text(body)[:100]!r}") from None
    _refuse_error(body, needed)
    return body


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


def _chat(choice: dict[str, Any], reason: str) -> tuple[dict[str, Any], str]:
    """An item's fields, and its problem."""
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
    if reason.lower() in CALLING and not calls and not refusal:
        return fields, reason  # announced, and not there
    return fields, _problem(reason, refusal, text=text or "", calls=calls)


def _problem(reason: str, refusal: Any, *, text: str, calls: Any = None) -> str:
    if refusal:
        return "refusal"
    if reason.lower() not in FINISHED:
        return reason or "no finish_reason"
    return "" if calls or text.strip() else "empty"


def _refuse_error(body: Any, needed: str = "") -> None:
    """Raises BadAnswer for an error with status 200, also beside a part of an answer.

    Args:
        needed: what an answer has; without it, a message is an error's.
    """
    if not isinstance(body, dict):
        return
    if body.get("error") or (needed and needed not in body and (body.get("message") or body.get("detail"))):
        raise BadAnswer(f"reported an error: {error_text(body)}")


def _encodable(value: Any) -> Any:
    """The JSON value with whole characters in its texts: an endpoint may cut one in two, which no row can hold."""
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        return _whole_characters(value)
    return value


def _whole_characters(value: Any) -> Any:
    match value:
        case str():
            return value if value.isascii() else encodable(value)
        case list():
            return [_whole_characters(each) for each in value]
        case dict():
            return {_whole_characters(name): _whole_characters(each) for name, each in value.items()}
    return value


def _vector(body: Any) -> dict[str, Any]:
    entries = body["data"]
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} vectors for one text")
    vector = entries[0]["embedding"]
    if not isinstance(vector, list) or not vector or not all(_is_number(each) for each in vector):
        raise TypeError("its embedding is no list of finite numbers")
    return {"embedding": vector}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _usage(given: Any) -> Usage | None:
    prompt = _count(given.get("prompt_tokens")) if isinstance(given, dict) else None
    if prompt is None:
        return None
    details = given.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=_count(given.get("completion_tokens")) or 0,
        cached_tokens=min(cached or 0, prompt),
    )


def _count(value: Any) -> int | None:
    """A number of tokens, which some endpoints write as 12.0."""
    return int(value) if _is_number(value) and value >= 0 and value == int(value) else None
