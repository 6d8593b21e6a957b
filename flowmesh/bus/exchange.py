"""Several commands to Redis in one write, and all their replies, under one time limit.

For what every task needs. A pipeline of redis-py starts a task, and a timer for each reply; that is two thirds of its
processor time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from flowmesh.bus.connection import redis

Command = Sequence[str | bytes]


async def exchange(client: redis.Redis, *commands: Command, transaction: bool = False) -> list[Any]:
    """Send the commands, and return their replies as Redis gives them.

    Args:
        transaction: all or none of them, with nothing of other clients between.

    Raises:
        RedisError, OSError: Redis is unreachable, or refused one of them: the first error.
        TimeoutError: they took longer than the client's socket timeout.
    """
    sent = (("MULTI",), *commands, ("EXEC",)) if transaction else commands
    connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    limit_s = connection.socket_timeout
    connection.socket_timeout = None  # one limit here, instead of one for the write and one for each reply
    try:
        async with asyncio.timeout(limit_s):
            await connection.send_packed_command(_packed(sent))
            replies = [await _reply(connection) for _ in sent]
    finally:
        connection.socket_timeout = limit_s
        await client.connection_pool.release(connection)
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    if not transaction:
        return replies
    done: list[Any] = replies[-1]
    for reply in done:
        if isinstance(reply, Exception):
            raise reply
    return done


def _packed(commands: Sequence[Command]) -> bytes:
    """As Redis reads them: the number of a command's words, then each with its length."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for word in command:
            data = word.encode() if isinstance(word, str) else word
            parts += b"$%d\r\n" % len(data), data, b"\r\n"
    return b"".join(parts)


async def _reply(connection: redis.Connection) -> Any:
    """The next reply; an error of its command is returned, as the replies after it must be read, too."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
