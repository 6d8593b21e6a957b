"""What stands before the library's server: the key, the paths that are served, the model's name, and counts.

vLLM's server has more paths than the API of OpenAI: some load adapters by name, or change the engine while it runs.
Only paths that are listed here reach it.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from runners.inference.openai.bodies import not_honoured
from runners.serve.numbers import Times

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MODEL_PATHS = frozenset(["/v1/chat/completions", "/v1/completions", "/v1/responses"])
"""Paths whose requests run the model: these alone are counted, so that a health check does not keep a server alive."""
MODELS_PATH = "/v1/models"
OTHER_PATHS = frozenset(["/health", MODELS_PATH])
MAX_BODY = 32 * 1024 * 1024
"""Bytes of a request's body, which is kept in memory."""
_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,12})')
_READ = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,12})')


_USAGE_EVENT = re.compile(rb'data: \{[^\n]*"choices":\[\],[^\n]*"usage":\{[^\n]*\}\s*')
"""The last event of a stream whose usage was asked for."""
_ERROR_EVENT = b'data: {"error":'


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One name that requests may give as their model."""

    name: str
    pinned: str
    """Its name for the library's server."""
    ends: tuple[int, ...] = ()
    """Tokens that end its answers besides those that the library's server knows."""


class Gate:
    """An ASGI application around another one.

    Args:
        app: the library's server.
        key: what a client sends as `Authorization: Bearer KEY`.
        models: at least one; the first is that of requests without a name.
        asks_usage: whether the library's server reports the tokens of a stream only to those who ask for it. The gate
            then asks, and keeps the report from clients that did not.
        fields: of requests, by path, that the library's server reads; it takes others without a word, so the gate
            refuses those that ask for something. A path without: it refuses them itself.
        own_key: the key of the task's own checks, whose requests are not counted. Empty: there are none.
        clock: seconds that never go back.
        numbers, times: what an earlier gate of the same address has counted.

    Attributes:
        requests: requests to the model so far, with those that failed.
        failed: those that were answered with a status of 500 and above, or with none, and streams with an error.
        running: requests to the model that are being answered now.
        tokens: tokens of answers, as the server reported them; a stream that ended early reports none.
        prompt_tokens: those of the requests, likewise.
        first_token: of streams: from the request to the first part of the answer.
        duration: of all requests, from the request to the end of the answer.
    """

    def __init__(
        self,
        app: App,
        key: str,
        models: Sequence[ServedModel],
        *,
        asks_usage: bool = False,
        fields: Mapping[str, Collection[str]] = MappingProxyType({}),
        own_key: str = "",
        numbers: Mapping[str, float] = MappingProxyType({}),
        times: Mapping[str, Sequence[float]] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not key:
            raise ValueError("key: is empty; generate one for each task")
        self._app = app
        self._expected = f"Bearer {key}".encode()
        self._own = f"Bearer {own_key}".encode() if own_key else None
        self._models = {model.name: model for model in models}
        self._default = models[0]
        self._asks_usage = asks_usage
        self._fields = fields
        self._clock = clock
        self._idle_since = self._moved = clock()
        self.requests = int(numbers.get("requests", 0))
        self.failed = int(numbers.get("failed", 0))
        self.running = 0
        self.tokens = int(numbers.get("completion_tokens", 0))
        self.prompt_tokens = int(numbers.get("prompt_tokens", 0))
        self.first_token = Times(times.get("first_token", ()))
        self.duration = Times(times.get("request", ()))

    def numbers(self) -> dict[str, float]:
        """The counts, as the node names them."""
        return {
            "requests": self.requests, "failed": self.failed, "running": self.running,
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens,
        }  # fmt: skip

    def times(self) -> dict[str, tuple[float, ...]]:
        """The durations, as the node names them."""
        return {"first_token": self.first_token.values(), "request": self.duration.values()}

    def idle_s(self) -> float:
        """Seconds since the last request to the model ended, or since the start; 0 while one is being answered."""
        return 0.0 if self.running else self._clock() - self._idle_since

    def silent_s(self) -> float:
        """Seconds since the last part of an answer was sent, or a request came."""
        return self._clock() - self._moved

    def start_idle(self) -> None:
        """Count the idle time from now on."""
        self._idle_since = self._clock()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass on what may pass; answer the rest with an error in the form of OpenAI's API."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        own = self._own is not None and len(given) == 1 and secrets.compare_digest(given[0], self._own)
        if not own and not (len(given) == 1 and secrets.compare_digest(given[0], self._expected)):
            await _refuse(send, 401, "the key is missing or wrong; send it as `Authorization: Bearer KEY`")
        elif scope["path"] == MODELS_PATH:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "flowmesh"} for name in self._models]
            await _answer(send, 200, {"object": "list", "data": models})
        elif scope["path"] in OTHER_PATHS:
            await self._app(scope, receive, send)
        elif scope["path"] not in MODEL_PATHS:
            known = ", ".join(sorted(MODEL_PATHS | OTHER_PATHS))
            await _refuse(send, 404, f"this path is not served; those that are: {known}")
        elif own:
            await self._ask(scope, receive, _Reply(send))
        else:
            await self._counted(scope, receive, send)

    async def _counted(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Also a stream counts as running until its last part is sent or its client has gone."""
        since = self._clock()

        def moved(*, first_token: bool) -> None:
            self._moved = self._clock()
            if first_token:
                self.first_token.add(self._moved - since)

        reply = _Reply(send, moved)
        self._moved = since
        self.requests += 1
        self.running += 1
        try:
            await self._ask(scope, receive, reply)
        finally:
            self.running -= 1
            self.failed += reply.status == 0 or reply.status >= 500 or reply.broke_off
            self.duration.add(self._clock() - since)
            self.tokens += reply.tokens(_TOKENS)
            self.prompt_tokens += reply.tokens(_READ)
            self._idle_since = self._clock()

    async def _ask(self, scope: MutableMapping[str, Any], receive: Receive, send: _Reply) -> None:
        """Pass a request on with the model's name replaced by the library's."""
        if scope.get("method") != "POST":
            await _refuse(send, 405, "send a POST")
            return
        data = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            data += message.get("body", b"")
            if len(data) > MAX_BODY:
                await _refuse(send, 413, f"the request's body has more than {MAX_BODY} bytes")
                return
            if not message.get("more_body"):
                break
        try:
            body = msgspec.json.decode(bytes(data), type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            await _refuse(send, 400, "the request's body is not a JSON object")
            return
        if (fault := self._fault(body, scope["path"])) is not None:
            await _refuse(send, 400, f"{fault[0]}: {fault[1]}", param=fault[0])
            return
        named = body.get("model")
        model = self._default if named is None else self._models.get(named) if isinstance(named, str) else None
        if model is None:
            known = " or ".join(map(repr, self._models))
            await _refuse(
                send, 404, f"the model {str(named)[:200]!r} is not served here; use {known}", "model_not_found"
            )
            return
        asked = msgspec.json.encode(self._completed(body, model, scope["path"], send))
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _REPLACED]
        headers += [(b"content-length", str(len(asked)).encode()), (b"content-type", b"application/json")]
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()  # that the client has gone
            given = True
            return {"type": "http.request", "body": asked, "more_body": False}

        await self._app({**scope, "headers": headers}, replayed, send)

    def _fault(self, body: dict[str, Any], path: str) -> tuple[str, str] | None:
        """A field that the library's server would ignore or take for another value, and what is wrong with it."""
        if not isinstance(body.get("stream"), bool | None):
            return "stream", "expected true or false"
        name = not_honoured(body, self._fields[path]) if path in self._fields else None
        return None if name is None else (name[:80], f"not a field of {path} here; leave it out")

    def _completed(self, body: dict[str, Any], model: ServedModel, path: str, reply: _Reply) -> dict[str, Any]:
        """A request's body as the library's server gets it."""
        body = body | {"model": model.pinned}
        given = body.get("stop_token_ids") or []
        if model.ends and isinstance(given, list) and not body.get("ignore_eos"):
            body["stop_token_ids"] = [*given, *model.ends]
        options = body.get("stream_options") or {}
        streams = path != "/v1/responses" and body.get("stream") is True  # a stream of responses always has its usage
        if self._asks_usage and streams and isinstance(options, dict) and not options.get("include_usage"):
            body["stream_options"] = options | {"include_usage": True}
            reply.hides_usage = True
        return body


class _Moved(Protocol):
    def __call__(self, *, first_token: bool) -> None: ...


class _Reply:
    """Passes an answer on, and keeps what is counted of it.

    Args:
        moved: called after each part; with `first_token` for the first one of a stream.

    Attributes:
        status: of the answer; 0 before it begins.
        broke_off: whether an event of the stream was an error.
        hides_usage: whether the event of a stream that has only the usage is kept from the client.
    """

    def __init__(self, send: Send, moved: _Moved | None = None) -> None:
        self._send = send
        self._noted = moved
        self._last = b""
        self._streams = False  # until its first part has come
        self.status = 0
        self.broke_off = False
        self.hides_usage = False

    async def __call__(self, message: Message) -> None:
        body = message.get("body", b"")
        first = False
        self.broke_off = self.broke_off or body.startswith(_ERROR_EVENT)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streams = self.status < 400 and any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        else:
            first = self._streams and bool(body)
            self._streams = self._streams and not first
            self._last = (self._last + body)[-4096:]  # the usage comes at the end
        if first and self._noted is not None:
            self._noted(first_token=True)
        if not (self.hides_usage and _USAGE_EVENT.fullmatch(body)):
            await self._send(message)
        if self._noted is not None:
            self._noted(first_token=False)

    def tokens(self, kind: re.Pattern[bytes]) -> int:
        """Those of the answer, as far as it reported them."""
        found = kind.findall(self._last) if self.status < 400 else []
        return int(found[-1]) if found else 0


_REPLACED = (b"content-length", b"content-type", b"transfer-encoding", b"authorization")


async def _refuse(send: Send, status: int, text: str, code: str | None = None, param: str | None = None) -> None:
    error = {"message": text, "type": "invalid_request_error", "param": param, "code": code or status}
    await _answer(send, status, {"error": error})


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
