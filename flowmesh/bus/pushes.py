"""What Redis sends to a subscriber, parsed as it arrives and passed on at once.

Every node receives every dispatch and every worker's event, so a deployment's size is bounded by what a message for
somebody else costs. redis-py's way to it is a dozen awaits for each message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from redis.exceptions import BusyLoadingError, InvalidResponse, NoPermissionError, ResponseError

Push = tuple[bytes, bytes, bytes]
"""Kind (`message`, `subscribe`, `pong`), channel and data. A number is written as its digits."""

_END = b"\r\n"
_ARRAY, _BULK, _STATUS, _ERROR = b"*$+-"


_ERRORS = {"NOPERM": NoPermissionError, "LOADING": BusyLoadingError}
"""By the code that Redis' text begins with; see `bus.connection_health` for what is made of them."""


class Parser:
    """For RESP2. Bytes may come cut at any place."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = 0
        """How long the first message in `_rest` is at least: a long one is not parsed at each of its parts."""

    def feed(self, data: bytes) -> list[Push]:
        """The messages that are complete now.

        Raises:
            ResponseError, ConnectionError (of redis-py): Redis answered with an error.
            InvalidResponse: what came is not of the protocol.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        found: list[Push] = []
        at = 0
        while at < len(data):
            try:
                push, end = _push(data, at)
            except ValueError as error:
                raise InvalidResponse(f"not of Redis' protocol: {data[at : at + 80]!r}") from error
            if push is None:
                self._needed = end - at
                self._rest += data[at:]
                break
            found.append(push)
            at = end
        return found


def _push(data: bytes, at: int) -> tuple[Push | None, int]:
    """The message at a position and its end; None and a bound below its end where it is not complete."""
    line_end = data.find(_END, at)
    if line_end < 0:
        return None, len(data) + 1
    if data[at] != _ARRAY:
        text = data[at + 1 : line_end]
        if data[at] == _ERROR:
            raise _error(text.decode(errors="replace"))
        if data[at] != _STATUS:
            raise ValueError("no push")
        return (text.lower(), b"", b""), line_end + 2
    parts = []
    count = int(data[at + 1 : line_end])
    at = line_end + 2
    for _ in range(count):
        line_end = data.find(_END, at)
        if line_end < 0:
            return None, len(data) + 1
        if data[at] == _BULK and (size := int(data[at + 1 : line_end])) >= 0:
            begin = line_end + 2
            at = begin + size + 2
            if at > len(data):
                return None, at
            parts.append(data[begin : begin + size])
        else:
            parts.append(data[at + 1 : line_end])
            at = line_end + 2
    kind, channel, content, *_ = *parts, b"", b"", b""
    return (kind, channel, content), at


def _error(text: str) -> Exception:
    code, _, rest = text.partition(" ")
    return _ERRORS[code](rest) if code in _ERRORS else ResponseError(text)


class Feed(asyncio.Protocol):
    """Takes over what a connection of redis-py receives; commands are sent through the connection as before.

    Args:
        connection: connected and logged in, with no answer outstanding.
        on_push: called in the order of the messages. What it raises ends the feed.
        gather_s: after each read nothing is read for so long, so that many messages cost one wake-up. 0: all is read
            as it comes.
    """

    def __init__(self, connection: Any, on_push: Callable[[Push], None], *, gather_s: float = 0.0) -> None:
        loop = asyncio.get_running_loop()
        self._later = loop.call_later
        self._now = loop.time
        self.heard_at = loop.time()
        """When something came last, by the loop's clock."""
        self.ended: asyncio.Future[BaseException] = loop.create_future()
        """Why nothing more will come."""
        self._parser = Parser()
        self._on_push = on_push
        self._gather_s = gather_s
        transport = connection._writer.transport  # there is no public way to it
        self._transport = transport
        self._before = transport.get_protocol()
        """Still told of what concerns writing and the end, for who sends and closes."""
        transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._now()
        if self.ended.done():
            return
        if self._gather_s:
            self._transport.pause_reading()
            self._later(self._gather_s, self._transport.resume_reading)
        try:
            for push in self._parser.feed(data):
                self._on_push(push)
        except Exception as error:  # noqa: BLE001 - raised again by who waits for `ended`
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._before.connection_lost(exc)
        self._end(exc or ConnectionError("Redis closed the connection"))

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def _end(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
