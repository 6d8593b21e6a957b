"""What stands before the library's server: the key, the paths that are served, and the count of what was asked.

The servers of vLLM and Transformers have more paths than the API of OpenAI: some load another model by name, unload the
one there is, or change the engine while it runs. Only paths that are listed here reach them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MODEL_PATHS = frozenset(["/v1/chat/completions", "/v1/completions", "/v1/responses"])
"""Paths whose requests run the model: these alone are counted, so that a health check does not keep a server alive."""
OTHER_PATHS = frozenset(["/health", "/v1/models"])


class Gate:
    """An ASGI application around another one.

    Args:
        app: the library's server.
        key: what a client sends as `Authorization: Bearer KEY`.
        clock: seconds that never go back.

    Attributes:
        requests: requests to the model so far, with those that failed.
        failed: those that were answered with a status of 500 and above, or with none.
        running: requests to the model that are being answered now.
    """

    def __init__(self, app: App, key: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not key:
            raise ValueError("key: is empty; generate one for each task")
        self._app = app
        self._expected = f"Bearer {key}".encode()
        self._clock = clock
        self._idle_since = clock()
        self.requests = 0
        self.failed = 0
        self.running = 0

    def idle_s(self) -> float:
        """Seconds since the last request to the model ended, or since the start; 0 while one is being answered."""
        return 0.0 if self.running else self._clock() - self._idle_since

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass on what may pass; answer the rest with an error in the form of OpenAI's API."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._has_key(scope):
            await _refuse(send, 401, "the key is missing or wrong; send it as `Authorization: Bearer KEY`")
        elif scope["path"] in OTHER_PATHS:
            await self._app(scope, receive, send)
        elif scope["path"] in MODEL_PATHS:
            await self._counted(scope, receive, send)
        else:
            known = ", ".join(sorted(MODEL_PATHS | OTHER_PATHS))
            await _refuse(send, 404, f"this path is not served; those that are: {known}")

    def _has_key(self, scope: MutableMapping[str, Any]) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)

    async def _counted(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Also a stream counts as running until its last part is sent or its client has gone."""
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.requests += 1
        self.running += 1
        try:
            await self._app(scope, receive, watched)
        finally:
            self.running -= 1
            self.failed += status == 0 or status >= 500
            self._idle_since = self._clock()


async def _refuse(send: Send, status: int, text: str) -> None:
    body = json.dumps({"error": {"message": text, "type": "invalid_request_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
