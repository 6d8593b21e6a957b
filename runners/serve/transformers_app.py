"""A model of Transformers as an ASGI application that answers as OpenAI's API does.

Requests are read, sampled and answered as the lines of a batch file are (`runners.inference.openai`), by the engine of
inference tasks. Transformers' own server honours few of OpenAI's fields, and takes the others without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import MutableMapping, Sequence
from typing import Any

import msgspec

from runners.api import BadRequest, Cancelled, RunnerError
from runners.inference.openai.lines import LineFault
from runners.serve.asked import CHAT, COMPLETION, Ask, AskReader, names_images
from runners.serve.gate import Receive, Send
from runners.serve.generator import Begun, Event, Generator, Job, Refused
from runners.serve.replies import Replies, encode

PATHS = (CHAT, COMPLETION)
JSON = b"application/json"


class TransformersApp:
    """The application. It serves POST requests to PATHS, and /health."""

    def __init__(self, reader: AskReader, replies: Replies, generator: Generator) -> None:
        self._reader = reader
        self._replies = replies
        self._generator = generator

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["path"] == "/health":
            await _answer(send, 200, {})
        elif scope["path"] not in PATHS:
            known = ", ".join(PATHS)
            await _refuse(
                send, Refused(f"{scope['path']} is served on vLLM only; on Transformers there are {known}", 404)
            )
        else:
            await self._complete(scope["path"], receive, send)

    async def _complete(self, path: str, receive: Receive, send: Send) -> None:
        given = await _body(receive)
        if given is None:
            return
        try:
            if names_images(given):  # there are few threads for all: texts do not wait for downloads
                ask = await asyncio.to_thread(self._read, path, given)
            else:
                ask = self._read(path, given)
        except LineFault as fault:
            await _refuse(send, Refused(fault.message, fault.status, fault.param))
            return
        except RunnerError as error:
            await _refuse(send, Refused(str(error), 400 if isinstance(error, BadRequest) else 502))
            return
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ask, self._replies.to(ask), tell)
        self._generator.put(job)
        leaving = asyncio.ensure_future(_left(receive, events))
        try:
            await _relay(ask, events, send)
        finally:
            job.gone.set()
            leaving.cancel()

    def _read(self, path: str, given: dict[str, Any]) -> Ask:
        try:
            return self._reader.read(path, given)
        except Cancelled:
            raise RunnerError("the model is not served any more") from None


async def _relay(ask: Ask, events: asyncio.Queue[Event | None], send: Send) -> None:
    """Send a reply's events until the last one, or until the client has gone."""
    begun = False
    while (event := await events.get()) is not None:
        match event:
            case Begun() if ask.stream:
                begun = True
                await _start(send, 200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
            case Begun():
                pass
            case Refused() if begun:
                await _send(send, encode(_error(event)))
            case Refused():
                await _refuse(send, event)
            case _ if ask.stream:
                await _send(send, encode(event))
            case _:
                await _answer(send, 200, event)
    if begun:
        await _send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive, events: asyncio.Queue[Event | None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _body(receive: Receive) -> dict[str, Any] | None:
    """The request's body, which the gate has checked to be an object; None: the client has gone."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        data += message.get("body", b"")
        if not message.get("more_body"):
            return msgspec.json.decode(bytes(data), type=dict[str, Any])


def _error(refused: Refused) -> dict[str, Any]:
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.status}}


async def _refuse(send: Send, refused: Refused) -> None:
    await _answer(send, refused.status, _error(refused))


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = msgspec.json.encode(content)
    await _start(send, status, [(b"content-type", JSON), (b"content-length", str(len(body)).encode())])
    await send({"type": "http.response.body", "body": body})


async def _start(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
