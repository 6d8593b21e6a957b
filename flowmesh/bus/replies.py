"""Redis' replies (RESP2), parsed as they arrive, for who sends several commands and waits for all their replies."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

_END = b"\r\n"
_ARRAY, _BULK, _STATUS, _ERROR, _INTEGER = b"*$+-:"


class Incomplete(Exception):
    """Raised when a reply goes on in what has not arrived yet."""


class ReplyLine(asyncio.Protocol):
    """Takes over a connection of redis-py: requests are answered in their order.

    Args:
        connection: connected and logged in, with no answer outstanding.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.ended: BaseException | None = None
        """Why nothing more will come."""
        self._loop = asyncio.get_running_loop()
        self._parse_error = connection._parser.parse_error  # there is no public way to these two
        self._transport = connection._writer.transport
        self._rest = b""
        self._replies: list[Any] = []
        self._requests: deque[tuple[int, asyncio.Future[list[Any]]]] = deque()
        self._before = self._transport.get_protocol()
        """Still told of what concerns writing and the end, for who closes."""
        self._transport.set_protocol(self)

    def ask(self, packed: bytes, replies: int) -> asyncio.Future[list[Any]]:
        """Send commands.

        Args:
            replies: how many of them there are.

        Returns:
            all their replies, errors among them; fails where the connection ends before.
        """
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        if self.ended is not None:  # since the caller has looked
            answer.set_exception(self.ended)
            return answer
        self._requests.append((replies, answer))
        self._transport.write(packed)
        return answer

    def end(self, error: BaseException) -> None:
        """Close the connection; what is still to be answered fails with this error."""
        if self.ended is not None:
            return
        self.ended = error
        self._transport.abort()
        while self._requests:
            _, answer = self._requests.popleft()
            if not answer.done():
                answer.set_exception(error)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        at = 0
        try:
            while at < len(data) and self.ended is None:
                reply, at = parse(data, at, self._parse_error)
                self._take(reply)
        except Incomplete:
            pass
        except (ValueError, IndexError) as error:
            shown = data[at : at + 80]
            self.end(InvalidResponse(f"not of Redis' protocol: {shown!r} ({error})"))
        self._rest = data[at:]

    def _take(self, reply: Any) -> None:
        if not self._requests:  # a goodbye: what follows is the end of the connection
            self.end(reply if isinstance(reply, Exception) else InvalidResponse(f"nothing was asked: {reply!r}"))
            return
        self._replies.append(reply)
        count, answer = self._requests[0]
        if len(self._replies) == count:
            self._requests.popleft()
            replies, self._replies = self._replies, []
            if not answer.done():
                answer.set_result(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        self._before.connection_lost(exc)
        self.end(RedisConnectionError(str(exc) if exc else "Redis closed the connection"))

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()


def parse(data: bytes, at: int, error_of: Callable[[str], Exception]) -> tuple[Any, int]:
    """The reply at a position, and its end. Errors of commands are returned.

    Raises:
        Incomplete: it is longer than the data.
        ValueError, IndexError: it is no reply.
    """
    line_end = data.find(_END, at)
    if line_end < 0:
        raise Incomplete
    kind, text = data[at], data[at + 1 : line_end]
    at = line_end + 2
    if kind == _BULK:
        size = int(text)
        if size < 0:
            return None, at
        if at + size + 2 > len(data):
            raise Incomplete
        return data[at : at + size], at + size + 2
    if kind == _INTEGER:
        return int(text), at
    if kind == _STATUS:
        return text, at
    if kind == _ERROR:
        return error_of(text.decode(errors="replace")), at
    if kind != _ARRAY:
        raise ValueError(f"unknown type {chr(kind)!r}")
    count = int(text)
    if count < 0:
        return None, at
    parts = []
    for _ in range(count):
        part, at = parse(data, at, error_of)
        parts.append(part)
    return parts, at
