"""Reads chat completions as servers really send them, whole or streamed.

The stream helpers of the `openai` package read a plain JSON answer as an empty stream, and join calls by index alone.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Collection
from typing import Any

import msgspec

from runners.agent.written import Malformed, as_object, encodable

MAX_ANSWER_BYTES = 64 * 2**20
RETRIED = frozenset({408, 409, 429})
"""Statuses below 500 of errors that are worth another attempt."""


class Unusable(Exception):
    """The answer is not a chat completion, or breaks off. Another attempt may get one."""


class Reported(Exception):
    """The endpoint reports an error in a response with status 200."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.may_pass = status is not None and (status in RETRIED or 500 <= status < 600)


class Call(msgspec.Struct, frozen=True):
    """A tool that the model calls."""

    id: str
    """Unique within the answer."""
    name: str
    arguments: dict[str, Any]
    """`Malformed` where the model's are not a JSON object."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a model."""

    content: str
    calls: tuple[Call, ...] = ()
    finish_reason: str = ""
    """As the endpoint gives it; empty where it gives none."""
    refusal: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def read_reply(chunks: AsyncIterator[bytes], tools: Collection[str]) -> Reply:
    """Read the body of a chat completion: one JSON object or server-sent events, whatever was asked for.

    Args:
        chunks: the body's bytes.
        tools: names of the tools that the request offered.

    Raises:
        Unusable: it is not a chat completion.
        Reported: it is an error.
    """
    completion = _Completion(tools)
    try:
        whole: list[bytes] = []
        event, streamed = "", False
        async for line in _lines(chunks):
            field, _, value = line.partition(b":")
            streamed = streamed or field in (b"event", b"data")
            if whole or (not streamed and line.lstrip().startswith((b"{", b"["))):
                whole.append(line)
            elif line.startswith(b"{"):  # written by a proxy in the middle of a stream
                completion.add(json.loads(line))
            elif field == b"event":
                event = value.strip().decode()
            elif not line.strip():
                event = ""
            elif field == b"data" and value.strip() == b"[DONE]":
                completion.ended = True
                break
            elif field == b"data" and event == "error":
                raise _reported(_json_or_text(value))
            elif field == b"data":
                completion.add(json.loads(value))
            elif field not in (b"", b"id", b"retry"):
                raise ValueError(f"it begins with {line[:50].decode(errors='replace')!r}")
        if whole:
            completion.add(json.loads(b"\n".join(whole)))
            completion.ended = True
        return completion.reply()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unusable(f"gave an answer that is not a chat completion ({type(error).__name__}: {reason})") from None


def error_text(body: Any) -> str:
    """The message of an error's body, in one line of at most 300 characters."""
    if isinstance(body, dict):
        body = body.get("error") or next((body[name] for name in ("message", "detail") if body.get(name)), body)
    if isinstance(body, dict):
        body = body.get("message") or json.dumps(body)
    return " ".join(str(body).split())[:300]


class _Completion:
    """Collects the parts of one answer. Malformed parts raise TypeError and the like, which `read_reply` converts."""

    def __init__(self, tools: Collection[str]) -> None:
        self.ended = False
        self._content: list[str] = []
        self._refusal: list[str] = []
        self._calls = _Calls(tools)
        self._finish_reason = ""
        self._usage: dict[str, Any] = {}
        self._chosen = False

    def add(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise TypeError(f"a JSON {type(body).__name__} in place of an object")
        if body.get("error") or ("choices" not in body and (body.get("message") or body.get("detail"))):
            raise _reported(body)
        self._usage = body["usage"] if isinstance(body.get("usage"), dict) else self._usage
        for choice in body.get("choices") or ():
            if choice.get("error"):
                raise _reported(choice)
            if choice.get("index") in (0, "0", None):
                self._chosen = True
                self._add_part(choice.get("delta" if "delta" in choice else "message") or {})
                self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def _add_part(self, part: dict[str, Any]) -> None:
        self._content.append(_text(part.get("content")))
        self._refusal.append(_text(part.get("refusal")))
        self._calls.add(part.get("tool_calls") or ())

    def reply(self) -> Reply:
        if not (self.ended or self._finish_reason):
            raise Unusable("broke off in the middle of its answer")
        if not self._chosen:
            raise Unusable("gave an answer without choices")
        return Reply(
            content=encodable("".join(self._content)),
            calls=self._calls.made(),
            finish_reason=str(self._finish_reason),
            refusal=encodable("".join(self._refusal)),
            prompt_tokens=int(self._usage.get("prompt_tokens") or 0),
            completion_tokens=int(self._usage.get("completion_tokens") or 0),
        )


class _Partial:
    """A call whose pieces are still coming."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.id = self.name = self.arguments = ""


class _Calls:
    """The calls of one answer, put together from their pieces.

    By the API each piece has its call's index, and only a call's first piece has id and name. Servers also give all
    calls one index, or none; no ids, the same for all or a new one with each piece; the name in pieces or in each one.
    """

    def __init__(self, tools: Collection[str]) -> None:
        self._tools = tools
        self._all: list[_Partial] = []
        self._at: dict[int | None, _Partial] = {}
        """By index; None: the one that the last piece belonged to."""

    def add(self, pieces: Any) -> None:
        """The pieces of one event."""
        seen: list[_Partial] = []
        for piece in pieces:
            index = piece.get("index")
            index = index if isinstance(index, int) else None
            function = piece.get("function") or {}
            identity, name = str(piece.get("id") or ""), str(function.get("name") or "")
            arguments = function.get("arguments") or ""
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            call = self._addressed(index, identity)
            if call is None or (name and call in seen) or self._is_another(call, identity, name, arguments):
                call = _Partial(index)
                self._all.append(call)
            self._at[index] = self._at[None] = call
            seen.append(call)
            call.id = call.id or identity
            call.name += name if name != call.name else ""
            call.arguments += arguments

    def _addressed(self, index: int | None, identity: str) -> _Partial | None:
        """The call that a piece belongs to, if it does not begin another."""
        for call in reversed(self._all):
            if identity and call.id == identity and index in (None, call.index):
                return call
        return self._at.get(index)

    def _is_another(self, call: _Partial, identity: str, name: str, arguments: str) -> bool:
        """Whether a piece that is addressed to `call` begins another call.

        Only a name can, or an id where `call` is complete or both came without arguments. Arguments that are a whole
        object cannot go on; a name before any arguments may be a part, unless both are names of tools.
        """
        other_id = bool(identity and call.id and identity != call.id)
        if not name:
            return other_id and (_is_whole(call.arguments) or bool(call.name and not arguments))
        if not call.arguments:
            return other_id or (name != call.name and name in self._tools and call.name in self._tools)
        return other_id or name != call.name or _is_whole(call.arguments)

    def made(self) -> tuple[Call, ...]:
        """The calls in the order in which they began, each with an id that no other has."""
        calls: dict[str, Call] = {}
        for each in self._all:
            identity = each.id if each.id and each.id not in calls else f"call_{uuid.uuid4().hex[:12]}"
            calls[identity] = Call(identity, encodable(each.name), as_object(encodable(each.arguments)))
        return tuple(calls.values())


def _is_whole(arguments: str) -> bool:
    return arguments.rstrip().endswith("}") and not isinstance(as_object(arguments), Malformed)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Split at line feeds only: JSON strings may hold other characters that `str.splitlines` splits at."""
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for each in others:
            yield b"".join(parts)
            parts = [each]
    yield b"".join(parts)


def _text(content: Any) -> str:
    """A message's text; of a list of parts those that are text."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the message's content is a JSON {type(content).__name__}")
    return content or ""


def _reported(body: Any) -> Reported:
    """The error in a body, with the HTTP status that it names, if any."""
    error = body.get("error") if isinstance(body, dict) else None
    named = [each.get(name) for each in (error, body) if isinstance(each, dict) for name in ("code", "status")]
    status = next((int(str(code)) for code in named if str(code).isdigit()), None)
    return Reported(error_text(body), status)


def _json_or_text(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
