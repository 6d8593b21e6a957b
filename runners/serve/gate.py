"""What stands before the library's server: the key, the paths that are served, the model's name, and counts.

The servers of vLLM and Transformers have more paths than the API of OpenAI: some load another model by name, unload the
one there is, or change the engine while it runs. Only paths that are listed here reach them.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

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


class Gate:
    """An ASGI application around another one.

    Args:
        app: the library's server.
        key: what a client sends as `Authorization: Bearer KEY`.
        name: the model's name for clients.
        pinned: its name for the library's server.
        own_key: the key of the task's own checks, whose requests are not counted. Empty: there are none.
        clock: seconds that never go back.
        numbers, times: what an earlier gate of the same address has counted.

    Attributes:
        requests: requests to the model so far, with those that failed.
        failed: those that were answered with a status of 500 and above, or with none.
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
        name: str,
        pinned: str,
        *,
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
        self._name = name
        self._pinned = pinned
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
            model = {"id": self._name, "object": "model", "created": 0, "owned_by": "flowmesh"}
            await _answer(send, 200, {"object": "list", "data": [model]})
        elif scope["path"] in OTHER_PATHS:
            await self._app(scope, receive, send)
        elif scope["path"] not in MODEL_PATHS:
            known = ", ".join(sorted(MODEL_PATHS | OTHER_PATHS))
            await _refuse(send, 404, f"this path is not served; those that are: {known}")
        elif own:
            await self._ask(scope, receive, send)
        else:
            await self._counted(scope, receive, send)

    async def _counted(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Also a stream counts as running until its last part is sent or its client has gone."""
        status = 0
        last = b""
        since = self._clock()
        streams = False  # until its first part has come

        async def watched(message: Message) -> None:
            nonlocal status, last, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = status < 400 and any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message.get("headers", ())
                )
            else:
                if streams and message.get("body"):
                    streams = False
                    self.first_token.add(self._clock() - since)
                last = (last + message.get("body", b""))[-4096:]  # the usage comes at the end
            await send(message)
            self._moved = self._clock()

        self._moved = self._clock()
        self.requests += 1
        self.running += 1
        try:
            await self._ask(scope, receive, watched)
        finally:
            self.running -= 1
            self.failed += status == 0 or status >= 500
            self.duration.add(self._clock() - since)
            if status < 400:
                self.tokens += int(([b"0", *_TOKENS.findall(last)])[-1])
                self.prompt_tokens += int(([b"0", *_READ.findall(last)])[-1])
            self._idle_since = self._clock()

    async def _ask(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
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
        model = body.get("model")
        if model not in (None, self._name):
            text = f"the model {str(model)[:200]!r} is not served here; use {self._name!r}"
            await _refuse(send, 404, text, "model_not_found")
            return
        asked = msgspec.json.encode(body | {"model": self._pinned})
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


_REPLACED = (b"content-length", b"content-type", b"transfer-encoding", b"authorization")


async def _refuse(send: Send, status: int, text: str, code: str | None = None) -> None:
    await _answer(send, status, {"error": {"message": text, "type": "invalid_request_error", "code": code or status}})


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
