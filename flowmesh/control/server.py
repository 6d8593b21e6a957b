"""The server of the node's control socket: one JSON object per line. Access is by file permission (the node's user).

For operations on this node: status, a task's files, cancel, drain, upgrade.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from flowmesh.errors import FlowMeshError
from flowmesh.messages.text import encode_json
from flowmesh.redaction import Redactor
from flowmesh.validation.describe import nearest

MAX_LINE = 64 * 1024
MAX_BULK = 32 * 1024 * 1024
LOOK_S = 1.0
READ_WITHIN_S = 30.0
"""A client that does not read for this long is cut off: what waits for it takes memory."""
WATCH_BACKLOG = 1000
"""Events queued for a slow watcher; beyond that, its progress events are dropped."""

Answer = dict[str, Any]
Handler = Callable[[dict[str, Any]], Answer | Awaitable[Answer]]
BulkHandler = Callable[[dict[str, Any], bytes], Answer]
Subscribe = Callable[[str, Callable[[Answer], None]], Callable[[], None]]


class ControlError(FlowMeshError):
    """A request cannot be fulfilled. The message is sent to the client."""


class ControlServer:
    """Answers requests.

    Args:
        path: of the socket; a stale one is replaced.
        handlers: by `op`; each gets the request and returns the fields to send beside `"ok": true`.
        subscribe: (task id, callback) → unsubscribe; for `watch`.
        redact: hides secrets in what is sent.
        bulk: as `handlers`, for requests with a field `bytes` that are followed by so many bytes.
    """

    def __init__(
        self,
        path: Path,
        handlers: dict[str, Handler],
        subscribe: Subscribe,
        redact: Redactor,
        *,
        bulk: Mapping[str, BulkHandler],
    ) -> None:
        self._path = path
        self._handlers = handlers
        self._bulk = bulk
        self._subscribe = subscribe
        self._redact = redact
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._peers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=MAX_LINE)
        self._path.chmod(0o600)
        self._inode = self._path.stat().st_ino

    async def keep(self) -> None:
        """Until cancelled: listen again when somebody has deleted the socket, as cleaners of temporary folders do."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._in_place():
                continue
            old, bound = self._server, logger.bind(path=str(self._path))
            try:
                self._path.parent.mkdir(mode=0o700, exist_ok=True)
                await self.start()
            except OSError as error:
                bound.debug("the control socket is gone and cannot be made again: {}", error)
                continue
            if old is not None:
                old.close()
            bound.warning("the control socket was gone: made again")

    def _in_place(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for peer in list(self._peers):
                peer.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        try:
            while line := await reader.readline():
                await self._answer(line, reader, writer)
        except (ConnectionError, EOFError, ValueError) as error:  # a line over MAX_LINE is a ValueError
            logger.bind(error=str(error)).debug("control connection closed")
        finally:
            self._peers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
            op = request.get("op")
            if op == "watch":
                await self._watch(text_field(request, "task_id"), reader, writer)
                return
            if isinstance(op, str) and (taker := self._bulk.get(op)) is not None:
                body = await reader.readexactly(_size(request))
                reply = {"ok": True, **taker(request, body)}
                if request.get("watch") is True and "refused" not in reply:
                    await self._watch(text_field(request, "task_id"), reader, writer, reply)
                else:
                    await self._send(writer, reply)
                return
            handler = self._handlers.get(op) if isinstance(op, str) else None
            if handler is None:
                known = [*self._handlers, *self._bulk, "watch"]
                raise ControlError(f"op: unknown operation {op!r}; {nearest(str(op), known)}")
            answer = handler(request)
            if not isinstance(answer, dict):
                answer = await answer
            reply = {"ok": True, **answer}
        except msgspec.DecodeError as error:
            reply = {"ok": False, "error": f"not a JSON object: {error}"}
        except FlowMeshError as error:
            reply = {"ok": False, "error": str(error)}
        await self._send(writer, reply)

    async def _watch(
        self,
        task_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: Answer | None = None,
    ) -> None:
        """Send a task's events until it ends or the client disconnects.

        Args:
            first: is sent before them.
        """
        events: asyncio.Queue[Answer | None] = asyncio.Queue()

        def put(event: Answer) -> None:
            if events.qsize() < WATCH_BACKLOG or event["event"] != "progress":
                events.put_nowait(event)

        unsubscribe = self._subscribe(task_id, put)
        gone = asyncio.create_task(reader.read(1))
        gone.add_done_callback(lambda _: events.put_nowait(None))
        try:
            if first is not None:
                await self._send(writer, first)
            while (event := await events.get()) is not None:
                await self._send(writer, event)
                if event["event"] == "end":
                    return
        finally:
            unsubscribe()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await gone

    async def _send(self, writer: asyncio.StreamWriter, message: Answer) -> None:
        """Raises ConnectionError where the client does not read."""
        writer.write(encode_json(self._redact.deep(message)) + b"\n")
        try:
            async with asyncio.timeout(READ_WITHIN_S):
                await writer.drain()
        except TimeoutError:
            writer.transport.abort()
            raise ConnectionAbortedError(f"the client has not read for {READ_WITHIN_S:.0f} s") from None


def text_field(request: dict[str, Any], name: str) -> str:
    """A required text field of a request.

    Raises:
        ControlError: it is missing or not text.
    """
    value = request.get(name)
    if not isinstance(value, str) or not value:
        raise ControlError(f"{name}: expected text that is not empty, found {value!r}")
    return value


def _size(request: dict[str, Any]) -> int:
    """How many bytes follow a request.

    Raises:
        ValueError: so many are not taken; the connection cannot go on.
    """
    size = request.get("bytes")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BULK:
        raise ValueError(f"bytes: expected a number up to {MAX_BULK}, found {size!r:.80}")
    return size
